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

# In a build of its own, because of what it depends on.
echo "== zeromq_notifier"
cargo build --quiet -p nkv-examples --features zeromq --example zeromq_notifier
timeout 30 cargo run --quiet -p nkv-examples --features zeromq --example zeromq_notifier

echo "== all examples have run"
