#!/usr/bin/env bash
# Builds the image of docker/Dockerfile from a static binary that this machine compiles. It pulls no image.
#
#   docker/image.sh [TAG]        the default TAG is ringway:latest
set -euo pipefail
cd "$(dirname "$0")/.."
tag=${1:-ringway:latest}
binary=$(packaging/static.sh)

context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
cp "$binary" "$context/ringway"
sed -e '1,/^# image.sh takes/d' -e 's/--from=build \/ringway/ringway/' docker/Dockerfile > "$context/Dockerfile"
docker build --quiet --tag "$tag" \
  --build-arg VERSION="$(sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml)" \
  --build-arg REVISION="$(git rev-parse HEAD 2>/dev/null || true)" "$context"
