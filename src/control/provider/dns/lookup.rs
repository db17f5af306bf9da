//! Asks name servers. The only file that knows the DNS library.
//!
//! Only a complete [`Answer`] says that a backend is gone. A server that does not answer in time, says that it failed, has cut the
//! answer off even over TCP, or sends something that is no answer, is a [`Fault`]. The IPv4 and IPv6 addresses of a name are one
//! answer. The targets of SRV records are complete without their addresses: a target whose own look-up fails is there.
//!
//! Aliases (CNAME) are followed here: the library's own way to follow them takes an alias of SRV records, and a circle of aliases,
//! for an empty answer.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream;
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverOpts};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::xfer::{DnsHandle as _, FirstAnswer as _};
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::{DnsRequestOptions, DnsResponse, Query, ResponseCode};
use hickory_resolver::proto::rr::{Name, RData, Record, RecordType};
use hickory_resolver::{NameServerPool, PoolContext, TlsConfig, system_conf};

use super::answer::{Answer, Fault, Found, Outcome};
use super::{Family, Question, Servers, Settings};

/// Targets of SRV records that are looked up at the same time.
const AT_ONCE: usize = 16;

/// Most aliases from a name to its records.
const MOST_ALIASES: usize = 8;

/// Name servers, and the names that a short name stands for.
#[derive(Debug)]
pub struct Resolver {
    servers: Vec<Server>,
    /// The server that answered last: the first one to ask.
    first: AtomicUsize,
    /// Domains to append to a name that does not end with a dot.
    search: Vec<Name>,
    /// A name with at least this number of dots is asked for as it is before a domain is appended.
    ndots: usize,
    timeout: Duration,
}

/// The records of one name and type.
#[derive(Debug, Default)]
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
        let failed = |text: String| Fault { outcome: Outcome::Failed, text };
        let (addresses, search, ndots) = match &settings.servers {
            Servers::Listed(addresses) => (addresses.clone(), Vec::new(), 0),
            Servers::System => {
                let (config, options) = system_conf::read_system_conf().map_err(|error| {
                    failed(format!("cannot use /etc/resolv.conf: {error}; name the servers in `servers`"))
                })?;
                let addresses = config.name_servers().iter().map(|server| SocketAddr::new(server.ip, 53));
                (addresses.collect(), config.search().to_vec(), options.ndots)
            }
        };
        let servers = addresses.into_iter().map(|address| Server::new(address, settings.timeout));
        let servers = servers.collect::<Result<_, _>>().map_err(|error| failed(error.to_string()))?;
        Ok(Self { servers, first: AtomicUsize::new(0), search, ndots, timeout: settings.timeout })
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
            answer = Answer { is_complete: fault.is_none(), ttl, fault, ..Answer::default() };
            for address in addresses.into_iter().map(|ip| SocketAddr::new(ip, port)) {
                let id: Arc<str> = address.to_string().into();
                let found = Found { id: Arc::clone(&id), addresses: vec![address], is_partial: false, rank: (0, 0) };
                answer.found.insert(id, found);
            }
            // If one name fails, the next one may be the name of something else.
            if answer.fault.is_some() || !answer.found.is_empty() {
                break;
            }
        }
        answer
    }

    /// A backend for each target of SRV records.
    async fn services_of(&self, name: &str, family: Family) -> Answer {
        let mut records = Records::default();
        for name in self.candidates(name) {
            match self.records(&name, RecordType::SRV).await {
                Ok(found) => records = found,
                Err(fault) => return Answer::failed(fault),
            }
            if !records.data.is_empty() {
                break;
            }
        }
        let lookups = targets(&records.data).into_iter().map(|((target, port), rank)| async move {
            let name = Name::from_ascii(&target).unwrap_or_default();
            let (addresses, ttl, fault) = self.addresses(&name, family).await;
            let addresses: Vec<_> = addresses.into_iter().map(|ip| SocketAddr::new(ip, port)).collect();
            let id: Arc<str> = format!("{}:{port}", target.trim_end_matches('.')).into();
            (Found { id, addresses, is_partial: fault.is_some(), rank }, ttl, fault)
        });
        let mut answer = Answer { is_complete: true, ttl: records.ttl, ..Answer::default() };
        // In the order of the targets, so that the same one tells its fault each time.
        let mut lookups = stream::iter(lookups).buffered(AT_ONCE);
        while let Some((found, ttl, fault)) = lookups.next().await {
            answer.ttl = shorter(answer.ttl, ttl);
            answer.fault = answer.fault.or(fault);
            // A target whose name has no address is not there. One whose look-up failed keeps the address that it had.
            if found.is_partial || !found.addresses.is_empty() {
                answer.found.insert(Arc::clone(&found.id), found);
            }
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
            if is_wanted { self.records(name, kind).await } else { Ok(Records::default()) }
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
        if let Some(fault) = fault.as_mut().filter(|_| !addresses.is_empty() && family == Family::Any) {
            // Some servers never answer for addresses of the family that they do not use.
            let found = if addresses.iter().all(IpAddr::is_ipv4) { "ipv4" } else { "ipv6" };
            let remedy = "if the name has only addresses like those found, set family:";
            fault.text = format!("{}; {remedy} {found}", fault.text);
        }
        (addresses, ttl, fault)
    }

    /// The records of a full name, behind its aliases.
    async fn records(&self, name: &Name, kind: RecordType) -> Result<Records, Fault> {
        let (mut current, mut ttl) = (name.clone(), None);
        for _ in 0..MOST_ALIASES {
            let (answers, valid) = self.answer(&current, kind).await?;
            ttl = shorter(ttl, valid);
            let of = |owner: &Name, kind| {
                let is_of = move |record: &&Record| record.name == *owner && record.record_type() == kind;
                answers.iter().filter(is_of).map(|record| &record.data).collect::<Vec<_>>()
            };
            let mut last = current.clone();
            // An answer has the aliases too. In a circle, they end here and are asked for again.
            for _ in 0..MOST_ALIASES {
                match of(&last, RecordType::CNAME).first() {
                    Some(RData::CNAME(next)) => last = next.0.clone(),
                    _ => break,
                }
            }
            let data: Vec<_> = of(&last, kind).into_iter().cloned().collect();
            if !data.is_empty() || answers.is_empty() {
                return Ok(Records { data, ttl });
            }
            if last == current {
                break;
            }
            current = last;
        }
        let text = format!("{name} {kind}: the answer leads to aliases (CNAME) without an end, or to other names");
        Err(Fault { outcome: Outcome::Failed, text })
    }

    /// The records of an answer and how long they are valid. Asks the servers, beginning with the one that answered last, until one
    /// answers.
    async fn answer(&self, name: &Name, kind: RecordType) -> Result<(Vec<Record>, Option<Duration>), Fault> {
        let seconds = |seconds: u32| Duration::from_secs(seconds.into());
        let (first, count) = (self.first.load(Ordering::Relaxed), self.servers.len());
        let mut fault = None;
        for n in (0..count).map(|n| (first + n) % count) {
            let server = &self.servers[n];
            let exchanged = tokio::time::timeout(self.timeout, server.exchange(name, kind));
            let answer = match exchanged.await.unwrap_or(Err(NetError::Timeout)) {
                Ok(response) => {
                    let ttl = response.answers.iter().map(|record| record.ttl).min();
                    Ok((response.into_message().answers, ttl.map(seconds)))
                }
                Err(NetError::Dns(DnsError::NoRecordsFound(none)))
                    if matches!(none.response_code, ResponseCode::NoError | ResponseCode::NXDomain)
                        && (none.ns.is_none() || none.soa.is_some()) =>
                {
                    Ok((Vec::new(), none.negative_ttl.map(seconds)))
                }
                Err(error) => Err(classify(&error)),
            };
            match answer {
                Ok(answer) => {
                    self.first.store(n, Ordering::Relaxed);
                    return Ok(answer);
                }
                // The fault of the first server says the most: the others are spares.
                Err((outcome, what)) => {
                    let text = format!("{name} {kind}: {} {what}", server.address);
                    fault.get_or_insert(Fault { outcome, text });
                }
            }
        }
        let no_server = || Fault { outcome: Outcome::Failed, text: "no name server is known".to_owned() };
        Err(fault.unwrap_or_else(no_server))
    }
}

type Connections = NameServerPool<TokioRuntimeProvider>;

/// A name server.
struct Server {
    address: SocketAddr,
    /// Over UDP, and over TCP if the answer is too long.
    usual: Connections,
    tcp: Connections,
    timeout: Duration,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.address.fmt(f)
    }
}

impl Server {
    fn new(address: SocketAddr, timeout: Duration) -> Result<Self, NetError> {
        let mut options = ResolverOpts::default();
        options.timeout = timeout;
        options.num_concurrent_reqs = 1;
        options.max_active_requests = 4 * AT_ONCE;
        let context = Arc::new(PoolContext::new(options, TlsConfig::new()?));
        let connections = |kinds: Vec<ConnectionConfig>| {
            let kinds = kinds.into_iter().map(|mut kind| {
                kind.port = address.port();
                kind
            });
            let server = NameServerConfig::new(address.ip(), true, kinds.collect());
            NameServerPool::from_config([server], Arc::clone(&context), TokioRuntimeProvider::default())
        };
        let usual = connections(vec![ConnectionConfig::udp(), ConnectionConfig::tcp()]);
        Ok(Self { address, usual, tcp: connections(vec![ConnectionConfig::tcp()]), timeout })
    }

    /// Asks over UDP. If nothing comes back in half of the time, or nothing that is an answer, asks over TCP too: a firewall may
    /// stop UDP.
    async fn exchange(&self, name: &Name, kind: RecordType) -> Result<DnsResponse, NetError> {
        let mut options = DnsRequestOptions::default();
        // The longest answer over UDP that fits most networks (dnsflagday.net/2020).
        options.edns_payload_len = 1232;
        let ask = |to: &Connections| to.lookup(Query::query(name.clone(), kind), options).first_answer();
        let mut usual = pin!(ask(&self.usual));
        match tokio::time::timeout(self.timeout / 2, &mut usual).await {
            Ok(result) if is_answer(&result) => result,
            Ok(_) => ask(&self.tcp).await,
            Err(_elapsed) => {
                let mut tcp = pin!(ask(&self.tcp));
                tokio::select! {
                    result = &mut usual => if is_answer(&result) { result } else { tcp.await },
                    result = &mut tcp => if is_answer(&result) { result } else { usual.await },
                }
            }
        }
    }
}

/// Whether the server has answered, in whatever way.
fn is_answer(result: &Result<DnsResponse, NetError>) -> bool {
    matches!(result, Ok(_) | Err(NetError::Dns(_) | NetError::Truncated))
}

/// The kind of a failure, and what the server did.
fn classify(error: &NetError) -> (Outcome, String) {
    let (outcome, what) = match error {
        NetError::Timeout => (Outcome::Timeout, "did not answer in time"),
        NetError::Truncated => (Outcome::Truncated, "cut the answer off, even over TCP"),
        NetError::Dns(DnsError::ResponseCode(ResponseCode::ServFail)) => (Outcome::ServerFailure, "failed (SERVFAIL)"),
        NetError::Dns(DnsError::ResponseCode(ResponseCode::Refused)) => (Outcome::Refused, "refused (REFUSED)"),
        NetError::Dns(DnsError::NoRecordsFound(_)) => {
            (Outcome::Failed, "referred to other servers: it does not resolve names for clients")
        }
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

/// The targets and ports of SRV records, with priority and weight.
fn targets(records: &[RData]) -> BTreeMap<(String, u16), (u16, u16)> {
    let mut targets = BTreeMap::new();
    for data in records {
        // A target of `.` says that there is no such service (RFC 2782).
        let RData::SRV(srv) = data else { continue };
        if srv.target.is_root() || srv.port == 0 {
            continue;
        }
        let rank = targets.entry((srv.target.to_ascii().to_lowercase(), srv.port)).or_insert((u16::MAX, 0));
        // Of records with the same target, the best priority and the highest weight count.
        *rank = match srv.priority.cmp(&rank.0) {
            std::cmp::Ordering::Less => (srv.priority, srv.weight),
            std::cmp::Ordering::Equal => (rank.0, rank.1.max(srv.weight)),
            std::cmp::Ordering::Greater => *rank,
        };
    }
    targets
}

fn shorter(one: Option<Duration>, other: Option<Duration>) -> Option<Duration> {
    one.into_iter().chain(other).min()
}
