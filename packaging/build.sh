#!/usr/bin/env bash
# Builds what a release consists of, beside the image: a Debian package, an archive with a static binary, and a bill of
# materials (CycloneDX). They come with their SHA-256 sums.
#
#   packaging/build.sh [REVISION]      writes to target/package/dist; REVISION is that of the Debian package, 1 by default
#
# It needs two programs:
#
#   cargo install --locked cargo-deb cargo-cyclonedx
set -euo pipefail
cd "$(dirname "$0")/.."
revision=${1:-1}
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml)
target=$(rustc -vV | sed -n 's/^host: //p')
for program in cargo-deb cargo-cyclonedx; do
  command -v "$program" >/dev/null || { echo "packaging/build.sh: $program is missing: cargo install --locked $program" >&2; exit 1; }
done
binary=$(packaging/static.sh)

# Cargo.toml names the files of the Debian package by these paths.
stage=target/package
rm -rf "$stage"
mkdir -p "$stage"/{dist,man,completions,systemd}
install -m 755 "$binary" "$stage/ringway"
if readelf --program-headers "$stage/ringway" | grep -q INTERP; then
  echo "packaging/build.sh: the binary needs a dynamic linker" >&2
  exit 1
fi
"$stage/ringway" man "$stage/man"
# Editors find the schema that the package has.
mkdir "$stage/examples"
for file in examples/*.yaml; do
  sed -e '1s#ringway.schema.json#/usr/share/ringway/ringway.schema.json#' "$file" > "$stage/examples/$(basename "$file")"
done
for shell in bash zsh fish; do "$stage/ringway" completions "$shell" > "$stage/completions/ringway.$shell"; done
"$stage/ringway" schema > "$stage/ringway.schema.json"
# The package has the binary elsewhere, and a user of its own.
sed -e 's#/usr/local/bin/#/usr/bin/#' -e '/^DynamicUser=/d' -e '/^# the group of a dynamic user/d' \
  -e 's/Clients of other users need `mode: "0666"`, because$/Members of the group ringway need `mode: "0660"`, others `mode: "0666"`./' \
  docs/systemd/ringway.service > "$stage/systemd/ringway.service"
cp docs/systemd/ringway.socket "$stage/systemd/"
# The config to start from.
cp "$stage/examples/start-static.yaml" "$stage/config.yaml"

cargo deb --no-build --no-strip --quiet --target "$target" --deb-revision "$revision" --output "$stage/dist/"

# cargo-cyclonedx writes beside each Cargo.toml.
trap 'rm -f ./*_bin.cdx.json echo-server/*_bin.cdx.json loadtest/*_bin.cdx.json' EXIT
# The bill of materials lists the crates of the binary, with their versions, licences and checksums.
cargo cyclonedx --quiet --format json --describe binaries --target "$target" --spec-version 1.5
mv ringway_bin.cdx.json "$stage/dist/ringway-$version.cdx.json"

name="ringway-$version-$target"
mkdir "$stage/$name"
cp -r "$stage"/{ringway,ringway.schema.json,man,completions} README.md LICENSE CHANGELOG.md config.yaml examples docs "$stage/$name/"
sed -i '1s#ringway.schema.json#../ringway.schema.json#' "$stage/$name"/examples/*.yaml
# The same files give the same archive.
time=$(git log -1 --format=%ct 2>/dev/null || date +%s)
tar --directory "$stage" --owner=0 --group=0 --numeric-owner --sort=name --mtime="@$time" -c "$name" |
  gzip -n > "$stage/dist/$name.tar.gz"
(cd "$stage/dist" && sha256sum -- * > SHA256SUMS)
ls "$PWD/$stage/dist/"
