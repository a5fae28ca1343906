#!/usr/bin/env bash
# Three nodes of a cluster on this machine, a subscriber on each, one node cut off and back: examples/cluster.sh NKV_SERVER NKV_CLIENT
#
# The server needs the feature `cluster`. It ends by itself, with 0 if all agree at the end.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
server="${1:?usage: $0 NKV_SERVER NKV_CLIENT}" client="${2:?usage: $0 NKV_SERVER NKV_CLIENT}"
dir="$(mktemp -d)"
pids=()
# A node that stands still ends once it goes on.
trap 'kill "${pids[@]}" 2>/dev/null || true; kill -CONT "${pids[@]}" 2>/dev/null || true; wait; rm -rf "$dir"' EXIT

list=static:127.0.0.1:7401,127.0.0.1:7402,127.0.0.1:7403
start() {
  "$server" "127.0.0.1:740$(($1 + 3))" --data-dir "$dir/n$1" --cluster example --gossip "127.0.0.1:740$1" --discover "$list" \
    2>>"$dir/log$1" &
  node[$1]=$!
  pids+=("${node[$1]}")
}
ask() { # NODE COMMAND...
  local at="127.0.0.1:740$(($1 + 3))"
  shift
  "$client" "$at" --wait 20s "$@"
}
answers() { # what a node has to answer, NODE COMMAND...
  local wanted="$1"
  shift
  [[ "$(ask "$@" 2>&1 || true)" == "$wanted" ]]
}
until_all() { # what all nodes have to answer, COMMAND...
  local wanted="$1" n
  shift
  for n in 1 2 3; do
    eventually answers "$wanted" "$n" "$@" || fail "node $n: $(ask "$n" "$@" 2>&1 || true), and not: $wanted"
  done
}

node=()
for n in 1 2 3; do start "$n"; done
# A node takes writes once it has a state: that of another, or none because it is alone.
eventually ask 1 put lamp.hall on 2>/dev/null || fail "node 1 takes no write"
until_all on get lamp.hall
for n in 1 2 3; do
  "$client" "127.0.0.1:740$((n + 3))" subscribe lamp >"$dir/seen$n" &
  pids+=($!)
done

# Node 3 stands still: the others go on without it.
kill -STOP "${node[3]}"
ask 1 put lamp.hall dimmed
ask 2 delete lamp.hall
ask 2 put lamp.cellar on
kill -CONT "${node[3]}"
until_all on get lamp.cellar
until_all "not found" get lamp.hall

# Node 2 dies, and comes back with its directory.
kill -KILL "${node[2]}"
ask 1 put lamp.attic on
start 2
until_all "lamp.attic = on
lamp.cellar = on" get 'lamp.*'
for n in 1 3; do
  eventually grep -q 'lamp.attic = on' "$dir/seen$n" || fail "the subscriber of node $n has not seen it"
done
echo "all three agree"
