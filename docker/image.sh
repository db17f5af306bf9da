#!/usr/bin/env bash
# Builds the image of docker/Dockerfile from a static binary that this machine compiles. It pulls no image.
#
#   docker/image.sh [TAG]        the default TAG is ringway:latest
set -euo pipefail
cd "$(dirname "$0")/.."
tag=${1:-ringway:latest}

target=$(rustc -vV | sed -n 's/^host: //p')
# A separate target folder: its flags differ from other builds, and cargo rebuilds everything when flags change.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/image
RUSTFLAGS="-C target-feature=+crt-static -C strip=symbols" \
  cargo build --release --locked --bin ringway --target "$target"

context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
cp "$CARGO_TARGET_DIR/$target/release/ringway" "$context/ringway"
sed -e '1,/^# image.sh takes/d' -e 's/--from=build \/ringway/ringway/' docker/Dockerfile > "$context/Dockerfile"
docker build --quiet --tag "$tag" "$context"
