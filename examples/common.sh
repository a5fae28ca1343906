# For the examples that are scripts: sourced, not run. `dir` is a directory of their own.

eventually() { # COMMAND...: until it succeeds, or for 30 s
  local end=$((SECONDS + 30))
  until "$@"; do
    ((SECONDS < end)) || return 1
    sleep 0.1
  done
}
fail() { # WHY
  echo "$1"
  cat "$dir"/*log* "$dir"/seen* 2>/dev/null || true
  exit 1
}
