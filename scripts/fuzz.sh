#!/usr/bin/env bash
# Fuzzes what reads bytes from peers and from the disk: scripts/fuzz.sh [--seconds N] [--keep] [TARGET...]
#
# Each target runs for N seconds (10) from its corpus in fuzz/corpus. It needs a C++ compiler for libFuzzer and no
# cargo-fuzz: on a stable toolchain the compiler is told to count edges, and where there is a nightly one, AddressSanitizer
# comes with it (NKV_FUZZ_TOOLCHAIN chooses). With --keep, what the runs found is put into fuzz/corpus, minimised.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

all=(requests messages keys http log_records recovery)
seconds=10 keep="" targets=()
while (($# > 0)); do
  case "$1" in
    --seconds) seconds="$2" && shift ;;
    --keep) keep=yes ;;
    -*) echo "usage: scripts/fuzz.sh [--seconds N] [--keep] [TARGET...]; targets: ${all[*]}" >&2 && exit 2 ;;
    *) targets+=("$1") ;;
  esac
  shift
done
((${#targets[@]} > 0)) || targets=("${all[@]}")

toolchain="${NKV_FUZZ_TOOLCHAIN:-}"
if [[ -z "$toolchain" ]]; then
  toolchain=stable
  if rustup toolchain list 2>/dev/null | grep -q ^nightly; then toolchain=nightly; fi
fi
host="$(rustc "+$toolchain" -vV | sed -n 's/^host: //p')"
flags="--cfg fuzzing -Cpasses=sancov-module"
for option in level=4 inline-8bit-counters pc-table trace-compares; do
  flags+=" -Cllvm-args=-sanitizer-coverage-$option"
done
if [[ "$toolchain" == nightly* ]]; then
  flags+=" -Zsanitizer=address -Cunsafe-allow-abi-mismatch=sanitizer"
fi

# With a target named, the flags do not reach build scripts and macros.
bins=()
for target in "${targets[@]}"; do bins+=(--bin "$target"); done
RUSTFLAGS="$flags" CARGO_TARGET_DIR=target/fuzz cargo "+$toolchain" build --quiet --release --locked \
  --manifest-path fuzz/Cargo.toml --target "$host" "${bins[@]}"

# The corpus becomes at most 100 small files: those that reach the most edges which no smaller one reaches, and those
# that somebody named, with a dash.
keep() {
  local target="$1" binary="$2" found="$3" corpus="fuzz/corpus/$1" new="target/fuzz/kept/$1" file
  rm -rf "$new" && mkdir -p "$new/merged"
  "$binary" -merge=1 -max_len=4095 -timeout=10 "-merge_control_file=$new/control" "$new/merged" "$corpus" "$found"
  awk 'NR == 1 { files = $1 } NR > 2 && NR <= files + 2 { name[NR - 3] = $0 } $1 == "COV" && NF > 2 { print NF, name[$2] }' \
    "$new/control" | sort -rn | awk 'NR <= 100 { print $2 }' | while read -r file; do
    cp "$file" "$new/$(sha1sum "$file" | cut -c1-16)"
  done
  find "$corpus" -name '*-*' -exec cp {} "$new" \;
  rm -rf "$corpus" "$new/merged" "$new/control" && cp -r "$new" "$corpus"
}

# libFuzzer ends in peace at Ctrl-C; no other target begins.
trap 'exit 130' INT
failed=0
for target in "${targets[@]}"; do
  binary="target/fuzz/$host/release/$target"
  corpus="fuzz/corpus/$target" found="target/fuzz/corpus/$target" crashes="target/fuzz/crashes/$target/" log="target/fuzz/$target.log"
  mkdir -p "$corpus" "$found" "$crashes"
  status=0
  "$binary" "-max_total_time=$seconds" -timeout=10 -rss_limit_mb=1024 -max_len=8192 -detect_leaks=0 -dict=fuzz/words.dict \
    -print_final_stats=1 "-artifact_prefix=$crashes" "$found" "$corpus" >"$log" 2>&1 || status=$?
  execs="$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")"
  coverage="$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$log" | tail -1)"
  echo "TEST fuzz_$target execs=${execs:-0} coverage=${coverage:-0} crashes=$((status != 0)) seconds=$seconds"
  if ((status != 0)); then
    failed=1
    tail -25 "$log"
    echo "$target failed; again with: $binary $(sed -n 's/.*Test unit written to //p' "$log")"
  elif ((${execs:-0} == 0 || ${coverage:-0} == 0)); then
    failed=1
    echo "$target failed: nothing was run, or no edges were counted"
  elif [[ -n "$keep" ]]; then
    keep "$target" "$binary" "$found" >>"$log" 2>&1
  fi
done
exit "$failed"
