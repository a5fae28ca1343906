#!/bin/sh
# A history of clients of three nodes in front of an engine of three members, each in a network namespace of its own: members are
# parted, killed and stand still, and everything that clients are answered and subscribers are sent is checked.
#
#     scripts/engine-partition.sh etcd|nats [SECONDS [SEED]]
#
# Needs root, `ip` and `unshare`, and the engine's program as its tests do (scripts/servers-etcd.sh, scripts/servers-nats.sh). All of
# it is in a network namespace that ends with the script; the network of the machine is not touched.
set -eu
engine=${1:?etcd or nats}
export NKV_HISTORY_SECONDS="${2:-60}" CARGO_NET_OFFLINE=true
[ $# -lt 3 ] || export NKV_SEED="$3"
cargo test -p "nkv-engine-$engine" --test histories --no-run
mkdir -p /run/netns
exec unshare --net --mount sh -c '
    mount -t tmpfs none /run/netns
    exec cargo test -p "nkv-engine-$1" --test histories -- --ignored --exact --nocapture \
        clients_of_three_nodes_agree_although_members_are_parted' sh "$engine"
