#!/usr/bin/env bash
# Builds the Swift package and runs its tests on Linux; checks the app's sources for syntax.
#     ios_demo/test-linux.sh
# With `swift` on the PATH that one is used. Otherwise Debian trixie's Swift 6.0 is put into a folder of its own
# (SWIFT_ROOT, default ~/.cache/edgesd-swift; 3.3 GB, once) and run there by chroot, which needs root.
set -euo pipefail
cd "$(dirname "$0")/.."

if command -v swift >/dev/null; then
  swift test --package-path ios_demo/EdgeSD
  swiftc -parse ios_demo/App/*.swift
  exit
fi

root=${SWIFT_ROOT:-$HOME/.cache/edgesd-swift}
if [ "$(id -u)" != 0 ]; then
  echo "No swift on the PATH, and this user may not chroot. Allowed: Swift 5.9 or later, or root. Install Swift, or run with sudo." >&2
  exit 5
fi

if [ ! -e "$root/.ready" ]; then
  command -v debootstrap >/dev/null || { apt-get update -qq && apt-get install -y -qq debootstrap; } >&2
  rm -rf "$root"
  mkdir -p "$root"
  echo "Putting Debian trixie and its Swift into $root" >&2
  debootstrap --variant=minbase --include=ca-certificates trixie "$root" "${DEBIAN_MIRROR:-http://deb.debian.org/debian}" >"$root.log" ||
    { tail -3 "$root.log" >&2; exit 1; }
  chroot "$root" sh -c 'apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    swiftlang libc6-dev libstdc++-14-dev binutils-gold git' >>"$root.log" || { tail -3 "$root.log" >&2; exit 1; }
  touch "$root/.ready"
fi

# The compiler finds its libraries through /proc. Mounts end with this script.
mounted=()
trap 'for place in "${mounted[@]}"; do umount "$place"; done' EXIT
for kind in proc:proc:/proc devtmpfs:dev:/dev; do
  IFS=: read -r type name place <<<"$kind"
  mountpoint -q "$root$place" && continue
  if [ "$type" = proc ]; then mount -t proc proc "$root$place"; else mount --bind /dev "$root$place"; fi
  mounted=("$root$place" "${mounted[@]}")
done

# What was built stays, the sources are put anew.
work=$root/edgesd
mkdir -p "$work/ios_demo/EdgeSD" "$work/tests"
rm -rf "$work/ios_demo/App" "$work/tests/golden" "$work"/ios_demo/EdgeSD/{Sources,Tests}
cp -rp ios_demo/App "$work/ios_demo/"
cp -rp ios_demo/EdgeSD/{Package.swift,Sources,Tests} "$work/ios_demo/EdgeSD/"
cp -rp tests/golden "$work/tests/"
chroot "$root" env HOME=/root LANG=C.UTF-8 sh -c 'cd /edgesd && swiftc -parse ios_demo/App/*.swift &&
  swift test --package-path ios_demo/EdgeSD'
