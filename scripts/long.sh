#!/usr/bin/env bash
# Tests that are too long for every change. Names of steps as arguments run those alone; --list names them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

steps=(model codec loom power kill faults cut)

run() {
  case "$1" in
    model)
      PROPTEST_CASES="${PROPTEST_CASES:-20000}" cargo test -p nkv-core --release --locked --test model
      ;;
    codec)
      PROPTEST_CASES="${PROPTEST_CASES:-20000}" cargo test -p nkv-protocol --release --locked --test codec
      PROPTEST_CASES="${PROPTEST_CASES:-20000}" cargo test -p nkv-persist-fs --release --locked --lib
      ;;
    loom)
      RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom LOOM_MAX_PREEMPTIONS="${LOOM_MAX_PREEMPTIONS:-3}" \
        cargo test -p nkv-core --release --locked --test loom_mailbox
      ;;
    power)
      NKV_IMAGES="${NKV_IMAGES:-100}" cargo test -p nkv-persist-fs --release --locked \
        --test power_loss --test io_errors --test corruption -- --nocapture
      ;;
    kill)
      NKV_KILL_CYCLES="${NKV_KILL_CYCLES:-500}" cargo test -p nkv-server --release --locked --test binary \
        what_was_acknowledged_survives_kill_9 -- --nocapture
      ;;
    faults)
      NKV_FAULTS=1 cargo test -p nkv-server --release --locked --test faults -- --nocapture
      ;;
    cut)
      cargo build --release --locked -p nkv-server --bin nkv-server
      scripts/power-cut.py target/release/nkv-server --cycles "${NKV_CUT_CYCLES:-200}"
      ;;
    *)
      echo "no step '$1'; the steps are: ${steps[*]}" >&2
      exit 2
      ;;
  esac
}

if [[ "${1:-}" == --list ]]; then
  printf '%s\n' "${steps[@]}"
  exit
fi
if (($# > 0)); then
  steps_chosen=("$@")
else
  steps_chosen=("${steps[@]}")
fi
for step in "${steps_chosen[@]}"; do
  printf '\n==> %s\n' "$step"
  SECONDS=0
  run "$step"
  printf '<== %s: %d s\n' "$step" "$SECONDS"
done
echo "long: all steps passed"
