#!/usr/bin/env bash
# Compiles the static binary of the image and the packages, and prints its path.
set -euo pipefail
cd "$(dirname "$0")/.."
target=$(rustc -vV | sed -n 's/^host: //p')
# A separate target folder: its flags differ from other builds, and cargo rebuilds everything when flags change.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}/image
# With --target, cargo does not apply the flags to build scripts and macros, which cannot be static.
RUSTFLAGS="-C target-feature=+crt-static -C strip=symbols" \
  cargo build --release --locked --bin ringway --target "$target" >&2
echo "$CARGO_TARGET_DIR/$target/release/ringway"
