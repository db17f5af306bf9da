//! The supervisor: keeps the wanted number of replicas alive.
//!
//! # Layout
//!
//! - [`plan`]: what to do next; pure
//! - [`process`]: carries the plan out with child processes
//! - [`launch`]: the step in a child before it becomes the replica
//! - [`output`]: what replicas say, into the log

pub mod launch;
pub mod plan;
pub mod process;

mod output;
