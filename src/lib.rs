//! Ringway: a Layer-4 TCP load balancer on a consistent-hash ring, with self-healing replicas.
pub mod ring;
