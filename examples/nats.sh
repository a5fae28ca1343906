#!/usr/bin/env bash
# Two servers in front of one NATS, with a subscriber on each: examples/nats.sh NKV_SERVER NKV_CLIENT NATS_SERVER
#
# The server needs the feature `nats`; scripts/servers-nats.sh DIR gets a NATS server. It ends by itself, with 0 if both saw all.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
usage="usage: $0 NKV_SERVER NKV_CLIENT NATS_SERVER"
server="${1:?$usage}" client="${2:?$usage}" nats="${3:?$usage}"
dir="$(mktemp -d)"
pids=()
saw() { # SERVER EVENT...
  local n="$1" event
  shift
  for event in "$@"; do grep -q "$event" "$dir/seen$n" || return 1; done
}
healthy() { "$client" "127.0.0.1:741$1" --wait 20s health >/dev/null 2>&1; }

trap 'kill "${pids[@]}" 2>/dev/null || true; wait; rm -rf "$dir"' EXIT

"$nats" --addr 127.0.0.1 --port 7421 --jetstream --store_dir "$dir/nats" 2>"$dir/nats.log" &
pids+=($!)
for n in 1 2; do
  "$server" "127.0.0.1:741$n" --engine nats://127.0.0.1:7421/lamps 2>"$dir/log$n" &
  pids+=($!)
  # A server takes writes once it follows its engine.
  eventually healthy "$n" || fail "server $n does not follow NATS"
  "$client" "127.0.0.1:741$n" subscribe lamp >"$dir/seen$n" 2>/dev/null &
  pids+=($!)
done

"$client" 127.0.0.1:7411 put lamp.hall on
# A subscriber that begins later would not see it go.
for n in 1 2; do eventually saw "$n" 'lamp.hall = on' || fail "the subscriber of server $n does not see a value"; done
"$client" 127.0.0.1:7412 put lamp.hall dimmed --if-revision "$("$client" 127.0.0.1:7411 get lamp.hall --json | sed -n 's/.*"revision":\([0-9]*\).*/\1/p')"
"$client" 127.0.0.1:7412 put lamp.cellar on
"$client" 127.0.0.1:7411 delete lamp.hall
for n in 1 2; do
  eventually saw "$n" 'lamp.cellar = on' 'lamp.hall deleted' || fail "the subscriber of server $n has not seen all"
done
[[ "$("$client" 127.0.0.1:7412 get lamp.cellar)" == on ]]
echo "both saw all"
