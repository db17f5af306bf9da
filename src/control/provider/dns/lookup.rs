//! Asks name servers. The only file that knows the DNS library.
//!
//! An [`Answer`] is complete, or it has a fault: a server that does not answer in time, says that it failed, or has cut the
//! answer off even over TCP. Only a complete answer says that an address is gone. IPv4 and IPv6 addresses, and the addresses
//! of all targets of SRV records, are one answer.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream;
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::{Name, RData, RecordType};
use hickory_resolver::{TokioResolver, system_conf};

use super::{Family, Question, Servers, Settings, WEIGHTS};
use crate::label_enum;

/// Targets of SRV records that are looked up at the same time.
const AT_ONCE: usize = 16;

label_enum! {
    /// How a look-up ended.
    pub enum Outcome {
        /// With at least one backend.
        Found => "found",
        /// With a complete answer without any backend. The name may not exist.
        Empty => "empty",
        /// No server answered in time.
        Timeout => "timeout",
        /// A server answered that it failed (SERVFAIL).
        ServerFailure => "server_failure",
        /// A server refused to answer (REFUSED).
        Refused => "refused",
        /// The answer was cut off, even over TCP.
        Truncated => "truncated",
        /// Something else failed: no server could be reached, or it sent something that is no answer.
        Failed => "failed",
    }
}

/// What a look-up found.
#[derive(Debug, Default)]
pub struct Answer {
    /// The backends by id.
    pub found: BTreeMap<Arc<str>, Found>,
    /// How long the answer is valid, if it says so.
    pub ttl: Option<Duration>,
    /// Why the answer is not complete.
    pub fault: Option<Fault>,
}

/// A backend of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Identity on the ring: `address:port`, for SRV records `target:port`.
    pub id: Arc<str>,
    /// Its addresses, IPv4 before IPv6.
    pub addresses: Vec<SocketAddr>,
    /// The look-up of its addresses failed, as a whole or for one family.
    pub is_partial: bool,
    /// Multiple of the ring's virtual nodes.
    pub weight: u32,
}

/// Why an answer is not complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The kind of the failure.
    pub outcome: Outcome,
    /// What failed, for a person.
    pub text: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Answer {
    /// An answer that failed as a whole.
    pub fn failed(fault: Fault) -> Self {
        Self { fault: Some(fault), ..Self::default() }
    }

    /// How the look-up ended.
    pub fn outcome(&self) -> Outcome {
        match &self.fault {
            Some(fault) => fault.outcome,
            None if self.found.is_empty() => Outcome::Empty,
            None => Outcome::Found,
        }
    }
}

/// Name servers, and the names that a short name stands for.
pub struct Resolver {
    servers: Vec<(SocketAddr, TokioResolver)>,
    /// Domains to append to a name that does not end with a dot.
    search: Vec<Name>,
    /// A name with at least this number of dots is asked for as it is before a domain is appended.
    ndots: usize,
    timeout: Duration,
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resolver").field("search", &self.search).finish_non_exhaustive()
    }
}

/// The records of one name and type.
struct Records {
    data: Vec<RData>,
    ttl: Option<Duration>,
}

impl Resolver {
    /// Reads `/etc/resolv.conf` if the servers are those of the system.
    ///
    /// # Errors
    /// When the file cannot be read or names no server.
    pub fn new(settings: &Settings) -> Result<Self, Fault> {
        let failed = |error: NetError| Fault { outcome: Outcome::Failed, text: error.to_string() };
        let (addresses, search, ndots) = match &settings.servers {
            Servers::Listed(addresses) => (addresses.clone(), Vec::new(), 0),
            Servers::System => {
                let (config, options) = system_conf::read_system_conf().map_err(|error| Fault {
                    outcome: Outcome::Failed,
                    text: format!("cannot use /etc/resolv.conf: {error}; name the servers in `servers`"),
                })?;
                let addresses = config.name_servers().iter().map(|server| SocketAddr::new(server.ip, 53));
                (addresses.collect(), config.search().to_vec(), options.ndots)
            }
        };
        // One resolver for each server: together, the library would stop at the first one that says SERVFAIL.
        let servers = addresses.into_iter().map(|address| Ok((address, resolver(address, settings.timeout)?)));
        let servers = servers.collect::<Result<_, _>>().map_err(failed)?;
        Ok(Self { servers, search, ndots, timeout: settings.timeout })
    }

    /// Looks up all backends that answer the question.
    pub async fn ask(&self, question: &Question, family: Family) -> Answer {
        match question {
            Question::Addresses { name, port } => self.addresses_of(name, *port, family).await,
            Question::Services { name } => self.services_of(name, family).await,
        }
    }

    /// A backend for each address of a name.
    async fn addresses_of(&self, name: &str, port: u16, family: Family) -> Answer {
        let mut answer = Answer::default();
        for name in self.candidates(name) {
            let (addresses, ttl, fault) = self.addresses(&name, family).await;
            let is_last = fault.is_some() || !addresses.is_empty();
            answer = Answer { ttl, fault, ..Answer::default() };
            for address in addresses.into_iter().map(|ip| SocketAddr::new(ip, port)) {
                let id: Arc<str> = address.to_string().into();
                let found = Found { id: Arc::clone(&id), addresses: vec![address], is_partial: false, weight: 1 };
                answer.found.insert(id, found);
            }
            // If one name fails, the next one may be the name of something else.
            if is_last {
                break;
            }
        }
        answer
    }

    /// A backend for each target of SRV records with the best priority.
    async fn services_of(&self, name: &str, family: Family) -> Answer {
        let mut records = Records { data: Vec::new(), ttl: None };
        for name in self.candidates(name) {
            match self.records(&name, RecordType::SRV).await {
                Ok(found) => records = found,
                Err(fault) => return Answer::failed(fault),
            }
            if !records.data.is_empty() {
                break;
            }
        }
        let targets = targets(&records.data);
        let lookups = targets.into_iter().map(|((target, port), weight)| async move {
            let name = Name::from_ascii(&target).unwrap_or_default();
            let (addresses, ttl, fault) = self.addresses(&name, family).await;
            let addresses: Vec<_> = addresses.into_iter().map(|ip| SocketAddr::new(ip, port)).collect();
            let id: Arc<str> = format!("{}:{port}", target.trim_end_matches('.')).into();
            (Found { id, addresses, is_partial: fault.is_some(), weight }, ttl, fault)
        });
        let mut answer = Answer { ttl: records.ttl, ..Answer::default() };
        let mut lookups = stream::iter(lookups).buffer_unordered(AT_ONCE);
        while let Some((found, ttl, fault)) = lookups.next().await {
            answer.ttl = shorter(answer.ttl, ttl);
            // A target whose name has no address is not there. One whose look-up failed keeps the address that it had.
            if found.is_partial || !found.addresses.is_empty() {
                answer.found.insert(Arc::clone(&found.id), found);
            }
            answer.fault = answer.fault.or(fault);
        }
        answer
    }

    /// The full names that a name stands for, in the order in which to try them (resolv.conf(5)).
    fn candidates(&self, name: &str) -> Vec<Name> {
        // The config holds only valid names.
        let Ok(mut full) = Name::from_ascii(name) else { return Vec::new() };
        if full.is_fqdn() {
            return vec![full];
        }
        let is_first = name.matches('.').count() >= self.ndots;
        let mut names: Vec<_> =
            self.search.iter().filter_map(|domain| full.clone().append_domain(domain).ok()).collect();
        full.set_fqdn(true);
        names.insert(if is_first { 0 } else { names.len() }, full);
        names
    }

    /// The addresses of a full name, sorted, with the shortest TTL. With a fault, some may be missing.
    async fn addresses(&self, name: &Name, family: Family) -> (Vec<IpAddr>, Option<Duration>, Option<Fault>) {
        let of = async |kind, is_wanted: bool| {
            if is_wanted { self.records(name, kind).await } else { Ok(Records { data: Vec::new(), ttl: None }) }
        };
        let (v4, v6) =
            tokio::join!(of(RecordType::A, family != Family::Ipv6), of(RecordType::AAAA, family != Family::Ipv4));
        let (mut addresses, mut ttl, mut fault) = (Vec::new(), None, None);
        for records in [v4, v6] {
            match records {
                Ok(records) => {
                    // The end of an answer without addresses says nothing about the other family's.
                    let ends = records.ttl.filter(|_| !records.data.is_empty() || addresses.is_empty());
                    ttl = shorter(ttl, ends);
                    addresses.extend(records.data.iter().filter_map(address));
                }
                Err(failed) => fault = fault.or(Some(failed)),
            }
        }
        addresses.sort();
        addresses.dedup();
        (addresses, ttl, fault)
    }

    /// The records of a full name. Asks the servers in order, until one answers.
    async fn records(&self, name: &Name, kind: RecordType) -> Result<Records, Fault> {
        let mut fault = None;
        for (server, resolver) in &self.servers {
            let lookup = tokio::time::timeout(self.timeout, resolver.lookup(name.clone(), kind));
            let failed = match lookup.await.unwrap_or(Err(NetError::Timeout)) {
                Ok(found) => {
                    let ttl = found.answers().iter().map(|record| record.ttl).min();
                    let of_kind = found.answers().iter().filter(|record| record.record_type() == kind);
                    let data = of_kind.map(|record| record.data.clone()).collect();
                    return Ok(Records { data, ttl: ttl.map(|ttl| Duration::from_secs(ttl.into())) });
                }
                Err(NetError::Dns(DnsError::NoRecordsFound(none)))
                    if matches!(none.response_code, ResponseCode::NoError | ResponseCode::NXDomain) =>
                {
                    let ttl = none.negative_ttl.map(|ttl| Duration::from_secs(ttl.into()));
                    return Ok(Records { data: Vec::new(), ttl });
                }
                Err(error) => error,
            };
            let (outcome, what) = classify(&failed);
            // The fault of the first server says the most: the others are spares.
            let text = || format!("{name} {kind}: {server} {what}");
            fault.get_or_insert_with(|| Fault { outcome, text: text() });
        }
        let no_server = || Fault { outcome: Outcome::Failed, text: "no name server is known".to_owned() };
        Err(fault.unwrap_or_else(no_server))
    }
}

/// A resolver for one server, over UDP, and over TCP if the answer is too long or UDP fails.
fn resolver(address: SocketAddr, timeout: Duration) -> Result<TokioResolver, NetError> {
    let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(|mut connection| {
        connection.port = address.port();
        connection
    });
    let server = NameServerConfig::new(address.ip(), true, connections.into());
    let mut options = ResolverOpts::default();
    options.timeout = timeout;
    options.attempts = 0;
    // The schedule decides when to ask again.
    options.cache_size = 0;
    options.use_hosts_file = ResolveHosts::Never;
    options.try_tcp_on_error = true;
    options.num_concurrent_reqs = 1;
    // The longest answer over UDP that fits most networks (dnsflagday.net/2020).
    options.edns_payload_len = 1232;
    options.max_active_requests = 4 * AT_ONCE;
    let config = ResolverConfig::from_name_servers(vec![server]);
    TokioResolver::builder_with_config(config, TokioRuntimeProvider::default()).with_options(options).build()
}

/// The kind of a failure, and what the server did.
fn classify(error: &NetError) -> (Outcome, String) {
    let (outcome, what) = match error {
        NetError::Timeout => (Outcome::Timeout, "did not answer in time"),
        NetError::Truncated => (Outcome::Truncated, "cut the answer off, even over TCP"),
        NetError::Dns(DnsError::ResponseCode(ResponseCode::ServFail)) => (Outcome::ServerFailure, "failed (SERVFAIL)"),
        NetError::Dns(DnsError::ResponseCode(ResponseCode::Refused)) => (Outcome::Refused, "refused (REFUSED)"),
        other => return (Outcome::Failed, format!("gave no answer: {other}")),
    };
    (outcome, what.to_owned())
}

/// The address of a record, if a server can have it.
fn address(record: &RData) -> Option<IpAddr> {
    let ip = match record {
        RData::A(address) => IpAddr::V4(address.0),
        RData::AAAA(address) => IpAddr::V6(address.0).to_canonical(),
        _ => return None,
    };
    // Some filters answer with 0.0.0.0 for names that they block: a connect to it would reach this machine.
    let is_broadcast = matches!(ip, IpAddr::V4(ip) if ip.is_broadcast());
    (!ip.is_unspecified() && !ip.is_multicast() && !is_broadcast).then_some(ip)
}

/// The targets and ports of SRV records with the lowest, that is best, priority, and their weights for the ring.
fn targets(records: &[RData]) -> BTreeMap<(String, u16), u32> {
    let records = records.iter().filter_map(|data| match data {
        // A target of `.` says that there is no such service (RFC 2782).
        RData::SRV(srv) if !srv.target.is_root() && srv.port > 0 => Some(srv),
        _ => None,
    });
    let best = records.clone().map(|srv| srv.priority).min();
    let mut targets = BTreeMap::new();
    for srv in records.filter(|srv| Some(srv.priority) == best) {
        let weight = targets.entry((srv.target.to_ascii().to_lowercase(), srv.port)).or_insert(0);
        *weight = srv.weight.max(*weight);
    }
    let most = targets.values().copied().max().unwrap_or_default();
    targets.into_iter().map(|(target, weight)| (target, scaled(weight, most))).collect()
}

/// A weight from 1 to 16, in proportion to the highest. All have 16 if all are 0.
fn scaled(weight: u16, most: u16) -> u32 {
    if most == 0 {
        return WEIGHTS;
    }
    let (weight, most) = (u32::from(weight), u32::from(most));
    ((weight * WEIGHTS + most / 2) / most).max(1)
}

fn shorter(one: Option<Duration>, other: Option<Duration>) -> Option<Duration> {
    one.into_iter().chain(other).min()
}
