#!/usr/bin/env bash
# Runs the tests of the core and of the protocol under Miri, which finds undefined behaviour in what they use.
# It needs a nightly toolchain with Miri: rustup component add miri rust-src --toolchain nightly
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! cargo +nightly miri --version >/dev/null 2>&1; then
  echo "TEST miri skipped: there is no Miri (rustup component add miri rust-src --toolchain nightly)"
  exit 0
fi
# Files of the corpus and of the transcripts are read. Random tests are cut down: a step takes a thousand times as long.
export MIRIFLAGS="-Zmiri-disable-isolation ${MIRIFLAGS:-}" PROPTEST_CASES="${PROPTEST_CASES:-1}" CARGO_TARGET_DIR=target/miri
log="$(mktemp)"
trap 'rm -f "$log"' EXIT
packages=0
for package in nkv-core nkv-protocol; do
  if ! cargo +nightly miri test -p "$package" --lib --tests --locked >>"$log" 2>&1; then
    tail -60 "$log"
    echo "TEST miri failed in $package"
    exit 1
  fi
  packages=$((packages + 1))
done
tests="$(sed -n 's/^test result: ok\. \([0-9]*\) passed.*/\1/p' "$log" | awk '{ sum += $1 } END { print sum }')"
echo "TEST miri packages=$packages tests=$tests undefined=0 seconds=$SECONDS"
