//! Tests with a real Docker engine and the image that `docker/image.sh` builds. Run them with `-- --ignored` as root.

mod adoption;
mod compose;
mod discover;
mod dns;
mod engine_away;
mod failures;
mod packages;
mod process_one;
mod registry;
mod replacement;
mod rivals;
mod rollouts;
mod scaling;
mod swarm;
