#!/usr/bin/env bash
# Builds the image of docker/Dockerfile from a static binary that is built on this machine: no image is pulled.
#
#   docker/image.sh [TAG]        TAG is ringway:latest unless given
set -euo pipefail
cd "$(dirname "$0")/.."
tag=${1:-ringway:latest}

target=$(rustc -vV | sed -n 's/^host: //p')
# A folder of its own: the flags differ from those of other builds, and each change of flags builds all anew.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/image
RUSTFLAGS="-C target-feature=+crt-static -C strip=symbols" \
  cargo build --release --locked --bin ringway --target "$target"

context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
cp "$CARGO_TARGET_DIR/$target/release/ringway" "$context/ringway"
sed -e '1,/^# image.sh takes/d' -e 's/--from=build \/ringway/ringway/' docker/Dockerfile > "$context/Dockerfile"
docker build --quiet --tag "$tag" "$context"
