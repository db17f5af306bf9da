//! What `loadtest compare` measures: the rows of its tables.

/// What the command measures. The order is the order of the rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Measure {
    RequestCpu,
    ConnectionCpu,
    NamedCpu,
    BulkCpu,
    StreamsCpu,
    P50,
    P99,
    BesideP50,
    BesideP99,
    RequestRate,
    IdleMemory,
    ProgramSize,
    StartUp,
}

impl Measure {
    pub(super) const ALL: [Self; 13] = [
        Self::RequestCpu,
        Self::ConnectionCpu,
        Self::NamedCpu,
        Self::BulkCpu,
        Self::StreamsCpu,
        Self::P50,
        Self::P99,
        Self::BesideP50,
        Self::BesideP99,
        Self::RequestRate,
        Self::IdleMemory,
        Self::ProgramSize,
        Self::StartUp,
    ];

    /// The measures in which less is better and a ratio is meaningful.
    pub(super) const COMPARED: [Self; 10] = [
        Self::RequestCpu,
        Self::ConnectionCpu,
        Self::NamedCpu,
        Self::BulkCpu,
        Self::StreamsCpu,
        Self::P50,
        Self::P99,
        Self::BesideP50,
        Self::BesideP99,
        Self::IdleMemory,
    ];

    /// The label in tables, plots and JSON.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::RequestCpu => "CPU µs per request",
            Self::ConnectionCpu => "CPU µs per connection",
            Self::NamedCpu => "CPU µs per connection by SNI",
            Self::BulkCpu => "CPU s per GB, 1 stream",
            Self::StreamsCpu => "CPU s per GB, 32 streams",
            Self::P50 => "p50 ms",
            Self::P99 => "p99 ms",
            Self::BesideP50 => "p50 ms beside 32 streams",
            Self::BesideP99 => "p99 ms beside 32 streams",
            Self::RequestRate => "requests per second",
            Self::IdleMemory => "bytes per idle connection",
            Self::ProgramSize => "program MB",
            Self::StartUp => "start-up ms",
        }
    }
}
