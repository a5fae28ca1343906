#!/usr/bin/env bash
# Tests that are too long for every change, within a budget of time.
#
#   soak.sh [--minutes N] [--list] [STEP...]
#
# The minutes (60 if not said) are shared equally among the steps; compiling is not counted. A step that takes a count is
# given what it does in its share, by the rates below; a variable that names a count, where one is mentioned, wins. All
# steps are run, also after one has failed; in the end every line of figures is printed again, and the exit code is 1 if
# any step failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

steps=(model codec loom power kill faults histories client hostile fuzz miri mutants cut partitions mixed)

# What two cores do in a second, in release mode: half of what was measured, as machines differ.
MODEL_CASES_PER_S=1000
CODEC_CASES_PER_S=1000
POWER_IMAGES_PER_S=1
KILL_CYCLES_PER_S=4
# One cycle of `sync` on each file system, and its part of the other scenarios.
CUT_CYCLES_PER_S=0.2

minutes=60
chosen=()
while (($# > 0)); do
  case "$1" in
    --list) printf '%s\n' "${steps[@]}"; exit ;;
    --minutes) minutes="${2:?--minutes takes a number}"; shift ;;
    -*) sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    *)
      if [[ " ${steps[*]} " != *" $1 "* ]]; then
        echo "no step '$1'; the steps are: ${steps[*]}" >&2
        exit 2
      fi
      chosen+=("$1")
      ;;
  esac
  shift
done
((${#chosen[@]} > 0)) || chosen=("${steps[@]}")
share=$((minutes * 60 / ${#chosen[@]}))

# count RATE: how many of something fit in a step's share; one at least.
count() {
  awk -v share="$share" -v rate="$1" 'BEGIN { n = int(share * rate); print (n > 1 ? n : 1) }'
}

target="${CARGO_TARGET_DIR:-target}"
server="$target/release/nkv-server"

build_server() {
  cargo build --release --locked -p nkv-server --bin nkv-server
}

run() {
  case "$1" in
    model)
      PROPTEST_CASES="${PROPTEST_CASES:-$(count "$MODEL_CASES_PER_S")}" \
        cargo test -p nkv-core --release --locked --test model -- --nocapture
      ;;
    codec)
      export PROPTEST_CASES="${PROPTEST_CASES:-$(count "$CODEC_CASES_PER_S")}"
      cargo test -p nkv-protocol --release --locked --test codec -- --nocapture
      cargo test -p nkv-persist-fs --release --locked --lib -- --nocapture
      ;;
    loom)
      # All interleavings with three preemptions: a minute or so, whatever the budget.
      RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR="$target/loom" LOOM_MAX_PREEMPTIONS="${LOOM_MAX_PREEMPTIONS:-3}" \
        cargo test -p nkv-core --release --locked --test loom_mailbox
      ;;
    power)
      NKV_IMAGES="${NKV_IMAGES:-$(count "$POWER_IMAGES_PER_S")}" cargo test -p nkv-persist-fs --release --locked \
        --test power_loss --test io_errors --test corruption -- --nocapture
      ;;
    kill)
      NKV_KILL_CYCLES="${NKV_KILL_CYCLES:-$(count "$KILL_CYCLES_PER_S")}" cargo test -p nkv-server --release --locked \
        --test binary what_was_acknowledged_survives_kill_9 -- --nocapture
      ;;
    faults)
      # Half a minute, whatever the budget.
      NKV_FAULTS=1 cargo test -p nkv-server --release --locked --test faults --test process_faults -- --nocapture
      ;;
    histories)
      # Half of it for the server, and half for etcd and the two servers of NATS.
      NKV_HISTORY_SECONDS="${NKV_HISTORY_SECONDS:-$((share / 2))}" cargo test -p nkv-server --release --locked \
        --test histories -- --nocapture
      NKV_HISTORY_SECONDS="${NKV_HISTORY_SECONDS:-$((share / 6 + 1))}" cargo test -p nkv-engine-etcd -p nkv-engine-nats \
        --release --locked --test histories -- --nocapture --test-threads 1
      ;;
    client)
      NKV_SOAK_SECONDS="${NKV_SOAK_SECONDS:-$share}" cargo test -p nkv-server --release --locked \
        --test client_soak -- --nocapture
      ;;
    hostile)
      # Two minutes, whatever the budget.
      cargo test -p nkv-server --release --locked --test hostile --test slow_readers -- --nocapture
      build_server
      scripts/half-open.py "$server"
      ;;
    # Five targets.
    fuzz) scripts/fuzz.sh --seconds "$((share / 5 + 1))" ;;
    # Some minutes each, whatever the budget.
    miri) scripts/miri.sh ;;
    mutants) NKV_FAULTS=1 scripts/mutants.py ;;
    cut)
      build_server
      NKV_FAULTS=1 scripts/power-cut.py "$server" --cycles "${NKV_CUT_CYCLES:-$(count "$CUT_CYCLES_PER_S")}"
      ;;
    partitions)
      cargo build --release --locked -p nkv-server --bin nkv-server --features cluster,grpc
      NKV_FAULTS=1 scripts/cluster-partition.py "$server" --seconds "$((share / 2 + 1))"
      NKV_FAULTS=1 scripts/cluster-partition.py "$server" --seconds "$((share / 2 + 1))" --mesh
      ;;
    mixed)
      build_server
      scripts/mixed-load.py "$server" --seconds "$share"
      ;;
  esac
}

logs="$(mktemp -d)"
trap 'rm -rf "$logs"' EXIT
trap 'exit 130' INT
failed=()
for step in "${chosen[@]}"; do
  printf '\n==> %s\n' "$step"
  SECONDS=0
  # What a step exports ends with it. Not as a condition, nor with `&&`: `set -e` would not hold within.
  set +e
  (set -e; run "$step") 2>&1 | tee "$logs/$step"
  status=${PIPESTATUS[0]} result=passed
  set -e
  if ((status != 0)); then
    failed+=("$step") result=FAILED
  fi
  printf '<== %s: %s after %d s\n' "$step" "$result" "$SECONDS"
  echo "$result $SECONDS" >"$logs/$step.result"
done

printf '\n'
for step in "${chosen[@]}"; do
  read -r result seconds <"$logs/$step.result"
  printf '%-10s %s, %d s\n' "$step" "$result" "$seconds"
  { grep -oE 'TEST [a-z0-9_]+ .*=.*' "$logs/$step" || true; } | sed 's/^TEST /           /'
done
if ((${#failed[@]} > 0)); then
  echo "soak: FAILED: ${failed[*]}"
  exit 1
fi
echo "soak: all steps passed"
