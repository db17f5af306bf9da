//! What a listener decides for a connection: its routes, the rules that lead to them, and who may connect. Pure.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use ::metrics::Histogram;
use tokio::sync::mpsc;

use super::key::KeyKind;
use super::pick::Balance;
use super::stats::{PoolStats, RefusalReason};
use super::wake::Wake;
use crate::backend::Failing;
use crate::client_hello::{Hello, host_name};
use crate::networks::Networks;
use crate::outgoing::Outgoing;
use crate::proxy_header::{OwnHeader, SendProxy, Tlv};
use crate::stream::Client;
use crate::table::{Bound, TableCell};

/// The name of the rule that takes what no other rule of a listener takes.
pub const DEFAULT: &str = "default";

/// What a listener decides for its connections.
#[derive(Debug)]
pub struct Routing {
    /// Whether a connection goes to the port of the backend to which its client has connected, in place of the backend's own.
    pub keeps_port: bool,
    /// Clients that may connect; `None`: all.
    pub allow: Option<Arc<Networks>>,
    /// Clients that may not connect; `None`: nobody. It wins over `allow`.
    pub deny: Option<Arc<Networks>>,
    /// The first rule that matches decides. The last one has no condition.
    pub rules: Box<[Rule]>,
    /// The routes to which the rules lead.
    pub routes: Box<[Route]>,
    /// How Ringway reads a ClientHello.
    pub hello: HelloSettings,
    /// Histogram of the lengths of ClientHellos, in bytes.
    pub hello_bytes: Histogram,
}

/// A condition, and the route of the connections that meet it.
#[derive(Debug)]
pub struct Rule {
    /// Unique among the rules of a listener.
    pub name: Arc<str>,
    /// When the rule matches.
    pub when: Condition,
    /// Index of the route; `None`: the connection is reset.
    pub route: Option<usize>,
    /// Connections that the rule has matched.
    pub matched: Arc<AtomicU64>,
}

/// When a rule matches. A part that is empty or absent matches always.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Condition {
    /// The client asks for one of these server names (SNI).
    pub sni: Vec<NamePattern>,
    /// The client offers one of these application protocols (ALPN).
    pub alpn: Vec<String>,
    /// The client is in one of these networks.
    pub from: Option<Networks>,
    /// Whether the client begins with TLS.
    pub tls: Option<bool>,
}

/// The part of a condition that does not hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mismatch {
    /// The client is in none of the networks.
    From,
    /// The client begins with TLS.
    IsTls,
    /// The client does not begin with TLS.
    IsPlain,
    /// The client asks for none of the names.
    Sni,
    /// The client offers none of the protocols.
    Alpn,
}

/// A server name, or all names that differ in their first label only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NamePattern {
    /// This name.
    Exact(Box<str>),
    /// One label before this suffix, which begins with a dot.
    AnyLabel(Box<str>),
}

/// How Ringway reads the ClientHello of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HelloSettings {
    /// How long Ringway waits for a whole ClientHello.
    pub timeout: Duration,
    /// Maximum length of a ClientHello in bytes.
    pub most: usize,
    /// Whether a connection whose first bytes decide nothing takes the last rule. Otherwise it is reset.
    pub undecided_takes_default: bool,
}

/// What the first bytes of a connection show.
#[derive(Debug, Clone, Copy)]
pub(super) enum Begin<'a> {
    /// A ClientHello.
    Tls(&'a Hello),
    /// Not TLS.
    Plain,
}

/// The first bytes of a connection, as far as Ringway can know them.
#[derive(Debug, Clone, Copy)]
pub(super) enum FirstBytes<'a> {
    /// They show this.
    Known(Begin<'a>),
    /// The client sends none.
    Silent,
    /// They are wrong, too many or too late.
    Undecided,
}

impl Routing {
    /// The rule of a connection; `None`: Ringway refuses it.
    pub(super) fn settle(&self, client: Client, first_bytes: FirstBytes<'_>) -> Option<usize> {
        let decided = match first_bytes {
            FirstBytes::Known(begin) => self.decide(client, Some(begin)),
            FirstBytes::Silent => self.decide_for_silent(client),
            FirstBytes::Undecided => None,
        };
        let default = || self.hello.undecided_takes_default.then(|| self.decide_undecided(client));
        // The bytes cannot change a decision that does not depend on them.
        self.decide(client, None).or(decided).or_else(default)
    }

    /// The index of the first rule that matches; `None` if that depends on bytes that are not known yet.
    pub(super) fn decide(&self, client: Client, begin: Option<Begin<'_>>) -> Option<usize> {
        for (n, rule) in self.rules.iter().enumerate() {
            if rule.when.holds(client, begin)? {
                return Some(n);
            }
        }
        None
    }

    /// The rule for a client that sends nothing. It is the rule of a client without TLS, if that rule or a later one has
    /// `tls: false`; otherwise `None`.
    fn decide_for_silent(&self, client: Client) -> Option<usize> {
        let rule = self.decide(client, Some(Begin::Plain))?;
        self.rules[rule..].iter().any(|later| later.when.tls == Some(false)).then_some(rule)
    }

    /// The first rule that needs no bytes and matches.
    fn decide_undecided(&self, client: Client) -> usize {
        let is_certain = |rule: &Rule| rule.when.holds(client, None) == Some(true);
        self.rules.iter().position(is_certain).unwrap_or(self.rules.len() - 1)
    }

    /// Why the client may not connect; `None`: it may.
    pub(super) fn keeps_out(&self, client: Client) -> Option<RefusalReason> {
        if self.deny.as_ref().is_some_and(|deny| deny.contains(client)) {
            return Some(RefusalReason::Denied);
        }
        self.allow.as_ref().is_some_and(|allow| !allow.contains(client)).then_some(RefusalReason::NotAllowed)
    }

    /// The route of a rule.
    pub(super) fn route_of(&self, rule: usize) -> Option<&Route> {
        Some(&self.routes[self.rules[rule].route?])
    }

    /// Whether a route passes on fields of this type from a PROXY header.
    pub(super) fn passes(&self, kind: u8) -> bool {
        let passes = |route: &Route| route.send_proxy.as_ref().is_some_and(|send| send.pass.contains(&kind));
        self.routes.iter().any(passes)
    }

    /// Whether connections can take another rule than the last one.
    pub fn has_rules(&self) -> bool {
        self.rules.len() > 1
    }
}

impl Condition {
    /// Whether the condition holds; `None` if that depends on bytes that are not known yet.
    pub(super) fn holds(&self, client: Client, begin: Option<Begin<'_>>) -> Option<bool> {
        self.check(client, begin).map(|checked| checked.is_ok())
    }

    /// Which part of the condition fails, if any; `None` if that depends on bytes that are not known yet.
    pub(super) fn check(&self, client: Client, begin: Option<Begin<'_>>) -> Option<Result<(), Mismatch>> {
        if self.from.as_ref().is_some_and(|from| !from.contains(client)) {
            return Some(Err(Mismatch::From));
        }
        let Some(tls) = self.needs_tls() else { return Some(Ok(())) };
        Some(match (begin?, tls) {
            (Begin::Plain, true) => Err(Mismatch::IsPlain),
            (Begin::Tls(_), false) => Err(Mismatch::IsTls),
            (Begin::Plain, false) => Ok(()),
            (Begin::Tls(hello), true) => self.takes(hello),
        })
    }

    /// Whether the condition asks for TLS, or for its absence; `None`: the bytes do not matter.
    pub fn needs_tls(&self) -> Option<bool> {
        if self.sni.is_empty() && self.alpn.is_empty() { self.tls } else { Some(true) }
    }

    fn takes(&self, hello: &Hello) -> Result<(), Mismatch> {
        let is_named = || {
            let name = hello.server_name.as_deref();
            name.is_some_and(|name| self.sni.iter().any(|pattern| pattern.matches(name)))
        };
        let is_offered =
            || hello.protocols().any(|offered| self.alpn.iter().any(|wanted| wanted.as_bytes() == offered));
        if !self.sni.is_empty() && !is_named() {
            return Err(Mismatch::Sni);
        }
        if self.alpn.is_empty() || is_offered() { Ok(()) } else { Err(Mismatch::Alpn) }
    }

    /// Whether every connection that meets `other` meets this condition too.
    pub fn covers(&self, other: &Self) -> bool {
        let covers_name = |name: &NamePattern| {
            self.sni
                .iter()
                .any(|own| own == name || if let NamePattern::Exact(name) = name { own.matches(name) } else { false })
        };
        let by_client = self.from.as_ref().is_none_or(|own| other.from.as_ref().is_some_and(|other| own.covers(other)));
        let by_tls = self.needs_tls().is_none_or(|own| other.needs_tls() == Some(own));
        let by_name = self.sni.is_empty() || !other.sni.is_empty() && other.sni.iter().all(covers_name);
        let by_protocol =
            self.alpn.is_empty() || !other.alpn.is_empty() && other.alpn.iter().all(|name| self.alpn.contains(name));
        by_client && by_tls && by_name && by_protocol
    }
}

impl NamePattern {
    fn matches(&self, name: &str) -> bool {
        match self {
            Self::Exact(own) => **own == *name,
            // The label is not empty: no host name begins with a dot.
            Self::AnyLabel(suffix) => name.strip_suffix(&**suffix).is_some_and(|label| !label.contains('.')),
        }
    }
}

impl std::str::FromStr for NamePattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let problem = || {
            format!(
                "{text:?} is not a server name: write it like www.example.com, or *.example.com for one label before it. Write \
                 other letters in their xn-- form. An IP address is not a server name"
            )
        };
        match text.strip_prefix("*.") {
            Some(rest) => host_name(rest).map(|rest| Self::AnyLabel(format!(".{rest}").into())),
            None => host_name(text).map(Self::Exact),
        }
        .ok_or_else(problem)
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(name) => f.write_str(name),
            Self::AnyLabel(suffix) => write!(f, "*{suffix}"),
        }
    }
}

/// How connections are balanced over a pool.
#[derive(Debug, Clone)]
pub struct Route {
    /// The pool's name.
    pub pool: Arc<str>,
    /// The part of a connection that is hashed.
    pub key: KeyKind,
    /// How a backend is chosen.
    pub balance: Balance,
    /// How many times its fair share of the connections a backend may have; `None`: any number. Only for [`Balance::Ring`].
    pub bound: Option<Arc<Bound>>,
    /// The pool's table.
    pub table: TableCell,
    /// Maximum connections per backend; a backend that has reached it is skipped.
    pub most_per_backend: u64,
    /// How connections wake the pool; `None`: it does not sleep.
    pub wake: Option<Wake>,
    /// The PROXY header that backends get; `None`: none.
    pub send_proxy: Option<Arc<SendProxy>>,
    /// The PROXY header with which the side port speaks to them.
    pub own_header: OwnHeader,
    /// Where connections to the backends come from; `None`: the kernel decides.
    pub outgoing: Option<Arc<Outgoing>>,
    /// Timeout of one connect attempt.
    pub connect_timeout: Duration,
    /// Maximum backends tried per connection; at least 1.
    pub connect_attempts: usize,
    /// A connection with no traffic for this long is reset.
    pub idle: Duration,
    /// The idle timeout once one side has ended its stream.
    pub half_closed: Duration,
    /// A connection is reset at this age, or up to a tenth sooner; `None`: never.
    pub max_age: Option<Duration>,
    /// After a change of the ring, connections whose keys lead to other backends end within this time; `None`: they stay.
    pub on_move: Option<Duration>,
    /// How long open connections may continue after the data plane was told to stop.
    pub drain: Duration,
    /// Histogram of successful connect times, in seconds.
    pub connect_seconds: Histogram,
    /// Reports backends whose connects keep failing; `None`: no reports.
    pub failing: Option<Reports>,
    /// The pool's counters.
    pub stats: Arc<PoolStats>,
}

impl Route {
    /// The route of a new pool: it makes one attempt, and all its times are zero.
    pub fn new(pool: Arc<str>, table: TableCell, connect_seconds: Histogram) -> Self {
        Self {
            pool,
            key: KeyKind::Source,
            balance: Balance::Ring,
            bound: None,
            table,
            most_per_backend: u64::MAX,
            wake: None,
            send_proxy: None,
            own_header: OwnHeader::Absent,
            outgoing: None,
            connect_timeout: Duration::ZERO,
            connect_attempts: 1,
            idle: Duration::ZERO,
            half_closed: Duration::ZERO,
            max_age: None,
            on_move: None,
            drain: Duration::ZERO,
            connect_seconds,
            failing: None,
            stats: Arc::default(),
        }
    }

    /// Whether the route reads a client's ClientHello.
    pub(super) fn needs_hello(&self) -> bool {
        self.key == KeyKind::Sni
            || self
                .send_proxy
                .as_ref()
                .is_some_and(|send| send.tlvs.iter().any(|tlv| matches!(tlv, Tlv::Authority | Tlv::Alpn)))
    }
}

/// How Ringway reports backends whose connects keep failing.
#[derive(Debug, Clone)]
pub struct Reports {
    /// Consecutive failures per report; at least 1. Every further series of this length makes another report.
    pub after: u32,
    /// Receives the reports. A full channel drops a report; later failures make another.
    pub to: mpsc::Sender<Failing>,
}

#[cfg(test)]
mod tests;
