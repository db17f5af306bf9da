# Shortcuts for https://just.systems. Every recipe is one or two plain commands, so `just` is optional.

# List the recipes
default:
    @just --list

# Run Ringway with the default config, or with other arguments: just run check --config examples/redis.yaml
run *args:
    cargo run --release --bin ringway -- {{args}}

# Run all tests that need neither Docker nor root; a word selects tests by name
test *filter:
    cargo test --workspace -- {{filter}}

# Check the format and run Clippy
lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets -- -D warnings

# Run the tests that need a Docker engine and root; they build the image
docker-tests *filter:
    cargo test --workspace -- --ignored {{filter}}

# Run the micro-benchmarks of the ring and the relay
bench:
    cargo bench --bench ring
    cargo bench --bench relay

# Build the documentation of all items, and fail on warnings
doc:
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items

# Check the dependencies' licenses and sources (needs cargo-deny)
deny:
    cargo deny check licenses bans sources

# Run everything that must pass before a merge; installs missing packages, so it needs root
gate:
    .ci/run
