#!/bin/sh
# Checks that a release of this module can be fetched: copies the repository, tags it as the release steps say, and has a
# fresh program get it by its path. No network is used. Usage: check-module.sh [VERSION]
set -eu

version=${1:-v0.0.1}
here=$(cd "$(dirname "$0")" && pwd)
module=$(sed -n 's/^module //p' "$here/go.mod")
repository=${module%/clients/go}
scratch=$(mktemp -d)
trap 'chmod -R u+w "$scratch"; rm -rf "$scratch"' EXIT

git clone --quiet --bare "$(git -C "$here" rev-parse --show-toplevel)" "$scratch/copy.git"
git -C "$scratch/copy.git" tag "clients/go/$version" "$(git -C "$here" rev-parse HEAD)"

# The path of the repository leads to the copy, and nothing else is asked.
export HOME="$scratch" GIT_CONFIG_GLOBAL="$scratch/gitconfig" GIT_ALLOW_PROTOCOL=file
git config --global "url.file://$scratch/copy.git.insteadOf" "https://$repository"
git config --global safe.directory '*'
export GOPROXY=direct GONOSUMDB='*' GOFLAGS=-mod=mod GOMODCACHE="$scratch/mod" GOCACHE="$scratch/cache" GOTOOLCHAIN=local

mkdir "$scratch/program"
cd "$scratch/program"
cat > main.go <<END
package main

import nkv "$module"

func main() {
	if _, err := nkv.Start("nobody@"); err == nil {
		panic("an address was accepted that is none")
	}
}
END

# Runs a command; what it says is shown only if it fails.
quietly() {
    "$@" >"$scratch/output" 2>&1 || { cat "$scratch/output" >&2; exit 1; }
}

quietly go mod init example.org/program
quietly go get "$module@$version"
go run .
go list -m "$module"
