#!/bin/sh
# Runs the scenarios with the test programs of the languages named: run.sh [go] [node] [python]; without a name, all.
# NKV_SERVER is the path of the server. With CI=true a language that is not installed is a failure.
set -u

here=$(cd "$(dirname "$0")" && pwd)
clients=$(dirname "$here")
: "${NKV_SERVER:?must be the path of the server, such as target/release/nkv-server}"
case $NKV_SERVER in /*) ;; *) NKV_SERVER=$PWD/$NKV_SERVER ;; esac
[ -x "$NKV_SERVER" ] || { echo "run.sh: $NKV_SERVER is not a program" >&2; exit 2; }
export NKV_SERVER
export NKV_SCENARIOS="$here"

failed=0

missing() {
    if [ "${CI:-}" = true ]; then
        echo "run.sh: $1: not installed: $2" >&2
        failed=1
    else
        echo "run.sh: $1: skipped, not installed: $2"
    fi
}

run() { # LANGUAGE COMMAND...: in the language's directory
    language=$1
    shift
    echo "run.sh: $language: $*"
    (cd "$clients/$language" && "$@") || { echo "run.sh: $language: FAILED" >&2; failed=1; }
}

[ $# -gt 0 ] || set -- go node python
command -v python3 >/dev/null || { missing proxy python3; exit $failed; }

for language in "$@"; do
    case $language in
    go)
        if ! command -v go >/dev/null; then missing go go; continue; fi
        run go go test -count=1 ./...
        ;;
    node)
        if ! command -v node >/dev/null; then missing node node; continue; fi
        if ! node -e 'process.exit(Number(process.versions.node.split(".")[0]) >= 20 ? 0 : 1)'; then
            missing node "node 20 or later"
            continue
        fi
        run node npm test
        ;;
    python)
        if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then missing python "python 3.10 or later"; continue; fi
        run python python3 -m unittest discover -s tests -t .
        ;;
    *)
        echo "run.sh: unknown language '$language'" >&2
        exit 2
        ;;
    esac
done
exit $failed
