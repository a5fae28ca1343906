#!/bin/sh
# Runs every example once. Each asserts what it shows and ends by itself; the first that does not is the end of this.
set -eu
cd "$(dirname "$0")/.."

cargo build --quiet -p nkv-examples --examples

run() {
    echo "== $*"
    example=$1
    shift
    timeout 30 cargo run --quiet -p nkv-examples --example "$example" -- "$@"
}

run server --self-check
run embed
run sqlite
run custom_persist
run custom_notifier
run datagram_notifier
run gateway
run tee
run live_map
run watch_config
run host_state

# The page beside it is opened by crates/nkv-http/page/tests, which has a browser.
if command -v python3 > /dev/null; then
    echo "== http/watch.py"
    cargo build --quiet -p nkv-server --bin nkv-server
    timeout 60 python3 examples/http/watch.py --self-check "${CARGO_TARGET_DIR:-target}/debug/nkv-server"
else
    echo "skipped: http/watch.py needs python3"
fi

echo "== cluster.sh"
cargo build --quiet -p nkv-server --features nkv-server/cluster,nkv-server/nats --bin nkv-server
cargo build --quiet -p nkv-client --bin nkv-client
timeout 120 examples/cluster.sh "${CARGO_TARGET_DIR:-target}/debug/nkv-server" "${CARGO_TARGET_DIR:-target}/debug/nkv-client"

if [ -x "${NKV_NATS_SERVER:-}" ]; then
    echo "== nats.sh"
    timeout 120 examples/nats.sh "${CARGO_TARGET_DIR:-target}/debug/nkv-server" "${CARGO_TARGET_DIR:-target}/debug/nkv-client" "$NKV_NATS_SERVER"
else
    echo "skipped: nats.sh needs NKV_NATS_SERVER, which scripts/servers-nats.sh gets"
fi

# In a build of its own, because of what it depends on.
echo "== zeromq_notifier"
cargo build --quiet -p nkv-examples --features zeromq --example zeromq_notifier
timeout 30 cargo run --quiet -p nkv-examples --features zeromq --example zeromq_notifier

echo "== all examples have run"
