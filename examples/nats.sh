#!/usr/bin/env bash
# Two servers in front of one NATS, with a subscriber on each: examples/nats.sh NKV_SERVER NKV_CLIENT NATS_SERVER
#
# The server needs the feature `nats`; scripts/servers-nats.sh DIR gets a NATS server. It ends by itself, with 0 if both saw all.
set -euo pipefail
usage="usage: $0 NKV_SERVER NKV_CLIENT NATS_SERVER"
server="${1:?$usage}" client="${2:?$usage}" nats="${3:?$usage}"
dir="$(mktemp -d)"
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true; wait; rm -rf "$dir"' EXIT

"$nats" --addr 127.0.0.1 --port 7421 --jetstream --store_dir "$dir/nats" 2>"$dir/nats.log" &
pids+=($!)
for n in 1 2; do
  "$server" "127.0.0.1:741$n" --engine nats://127.0.0.1:7421/lamps 2>"$dir/log$n" &
  pids+=($!)
  # A server takes writes once it follows its engine.
  until "$client" "127.0.0.1:741$n" --wait 20s health >/dev/null 2>&1; do sleep 0.1; done
  "$client" "127.0.0.1:741$n" subscribe lamp >"$dir/seen$n" 2>/dev/null &
  pids+=($!)
done

"$client" 127.0.0.1:7411 put lamp.hall on
"$client" 127.0.0.1:7412 put lamp.hall dimmed --if-revision "$("$client" 127.0.0.1:7411 get lamp.hall --json | sed -n 's/.*"revision":\([0-9]*\).*/\1/p')"
"$client" 127.0.0.1:7412 put lamp.cellar on
"$client" 127.0.0.1:7411 delete lamp.hall
for n in 1 2; do
  for _ in $(seq 100); do
    if grep -q 'lamp.cellar = on' "$dir/seen$n" && grep -q 'lamp.hall deleted' "$dir/seen$n"; then continue 2; fi
    sleep 0.1
  done
  echo "the subscriber of server $n saw:"
  cat "$dir/seen$n" "$dir/log$n"
  exit 1
done
[[ "$("$client" 127.0.0.1:7412 get lamp.cellar)" == on ]]
echo "both saw all"
