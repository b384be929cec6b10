#!/bin/sh
# Debian's ONNX Runtime headers for `cmake -DRXDEPLOY_ONNXRUNTIME_ROOT=DIR/usr`, from another suite than this machine's.
#
#   fetch_onnxruntime_headers.sh DIR [SUITE]
#
# apt works in DIR with lists of its own: the system's packages, lists and sources stay as they are. The mirror is the
# first Debian mirror among the system's configured sources, the key is the one that came with Debian's keyring.
set -eu

[ $# -ge 1 ] || { echo "usage: $0 DIR [SUITE]" >&2; exit 2; }
mkdir -p "$1"
dir=$(cd "$1" && pwd)
suite=${2:-trixie}
package=libonnxruntime-dev
if [ -e "$dir/usr/include/onnxruntime/onnxruntime_c_api.h" ]; then
    echo "$dir/usr"
    exit
fi

# The first archive that has Debian's main suites: deb822 files (URIs:) first, then one-line files (deb ...).
mirror=$(cat /etc/apt/sources.list.d/*.sources 2>/dev/null |
    sed -n 's/^URIs:[[:space:]]*\([^[:space:]]*\/debian\/\{0,1\}\)\([[:space:]].*\)\{0,1\}$/\1/p' | head -n 1)
if [ -z "$mirror" ]; then
    mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null |
        sed -n 's/^deb \(\[[^]]*\] \)\{0,1\}\([^ ]*\/debian\/\{0,1\}\) .*/\2/p' | head -n 1)
fi
[ -n "$mirror" ] || { echo "$0: no Debian mirror is configured in /etc/apt" >&2; exit 3; }
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[ -e "$keyring" ] || { echo "$0: $keyring is missing; apt-get install debian-archive-keyring" >&2; exit 3; }

mkdir -p "$dir/apt/lists/partial" "$dir/apt/cache/archives/partial" "$dir/apt/parts"
: >"$dir/apt/status"
echo "deb [signed-by=$keyring] $mirror $suite main" >"$dir/apt/sources.list"
private() {
    apt-get -q -o Dir::Etc::sourcelist="$dir/apt/sources.list" -o Dir::Etc::sourceparts="$dir/apt/parts" \
        -o Dir::Etc::preferencesparts="$dir/apt/parts" -o Dir::State="$dir/apt" -o Dir::State::lists="$dir/apt/lists" \
        -o Dir::State::status="$dir/apt/status" -o Dir::Cache="$dir/apt/cache" -o APT::Sandbox::User=root "$@"
}
{
    private update
    cd "$dir/apt"
    private download "$package"
    dpkg -x "$dir/apt/$package"_*.deb "$dir"
} >&2
rm -rf "$dir/apt"
echo "$dir/usr"
