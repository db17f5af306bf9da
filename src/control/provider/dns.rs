//! The provider `dns`: the addresses of a name, or the targets of SRV records, are the pool's backends.
//!
//! # Layout
//!
//! - this file: settings, and the task that asks again and again
//! - [`lookup`]: asks name servers
//! - [`answer`]: what a look-up found
//! - [`members`]: the backends that follow from the answers, and when to ask next
//! - [`mod@status`]: what status and metrics show of it

pub mod answer;
pub mod lookup;
pub mod members;
pub mod status;

#[cfg(test)]
mod tests;

use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::BuildHasher as _;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};

use self::answer::Answer;
use self::lookup::Resolver;
use self::members::{Members, Rules, Schedule};
use self::status::DnsStatus;
use crate::backend::State;
use crate::control::Event;
use crate::label_enum;
use crate::table::{Table, TableCell};

/// Longest time that a start waits for the first answer.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// Weights of SRV records become numbers from 1 to this one. The ring of such a pool has about as many points for this weight as that
/// of another pool has for weight 1.
pub const WEIGHTS: u32 = 16;

/// Failures in a row after which Ringway reads `/etc/resolv.conf` again.
const FORGET: u32 = 3;

/// The states of a backend that does not work.
const FAILING: [State; 2] = [State::Unhealthy, State::Ejected];

/// Settings of the provider.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// What Ringway asks for.
    pub question: Question,
    /// The addresses that Ringway uses.
    pub family: Family,
    /// Whom Ringway asks.
    pub servers: Servers,
    /// Shortest and longest time from one question to the next. Between them, the TTL of the answer decides.
    pub refresh: RangeInclusive<Duration>,
    /// Longest wait for the answer of one server.
    pub timeout: Duration,
    /// How long a backend must be missing from complete answers before it leaves.
    pub gone_after: Duration,
}

/// What Ringway asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Question {
    /// A and AAAA records. All backends listen on the same port.
    Addresses {
        /// The name. Without a dot at its end, the search list of the system applies.
        name: String,
        /// TCP port of the backends.
        port: u16,
    },
    /// SRV records, which have ports and weights.
    Services {
        /// The name, like `_redis._tcp.example.com.`.
        name: String,
    },
}

impl fmt::Display for Question {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Addresses { name, port } => write!(f, "{name} port {port}"),
            Self::Services { name } => write!(f, "{name} (SRV)"),
        }
    }
}

label_enum! {
    /// The addresses that Ringway uses.
    pub enum Family {
        /// IPv4 and IPv6.
        Any => "any",
        /// IPv4.
        Ipv4 => "ipv4",
        /// IPv6.
        Ipv6 => "ipv6",
    }
}

/// Whom Ringway asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Servers {
    /// The name servers in `/etc/resolv.conf`.
    System,
    /// These, in this order. The list is not empty.
    Listed(Vec<SocketAddr>),
}

/// What applies at the moment: the settings and the rules of the pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Current {
    /// The settings of the provider.
    pub settings: Settings,
    /// What applies to the backends.
    pub rules: Rules,
}

/// Asks again and again.
#[derive(Debug)]
pub struct Follower {
    pool: Arc<str>,
    current: watch::Receiver<Current>,
    members: Members,
    schedule: Schedule,
    resolver: Option<Resolver>,
    status: Arc<DnsStatus>,
    random: RandomState,
}

impl Follower {
    /// A follower that has not asked yet. Its members are what an earlier process knew.
    pub fn new(pool: Arc<str>, current: watch::Receiver<Current>, members: Members, status: Arc<DnsStatus>) -> Self {
        let schedule = Schedule::new(Instant::now());
        Self { pool, current, members, schedule, resolver: None, status, random: RandomState::new() }
    }

    /// The first look-up. Repeats it for up to [`PATIENCE`] while it fails and no backend is known. Returns the events for the
    /// publisher, and why there was no answer.
    pub async fn begin(&mut self) -> (Vec<Event>, Option<Arc<str>>) {
        let mut events = Vec::new();
        let repeated = async {
            loop {
                tokio::time::sleep_until(self.schedule.next.into()).await;
                let answer = self.ask().await;
                events.extend(self.take(&answer, |_| false));
                if self.schedule.failures() == 0 || self.members.count() > 0 {
                    return;
                }
            }
        };
        let is_answered = tokio::time::timeout(PATIENCE, repeated).await.is_ok() || self.members.count() > 0;
        let why = || self.status.last().error.clone().unwrap_or_else(|| "no answer in time".into());
        (events, (!is_answered).then(why))
    }

    /// Asks until the pool ends: when the last answer has expired, when a backend fails, and when the settings change or are
    /// reloaded.
    pub async fn run(mut self, table: TableCell, events: mpsc::Sender<Event>) {
        let mut tables = table.watch();
        loop {
            let refresh = self.current.borrow().settings.refresh.clone();
            self.schedule.hurry(any_fails(&table.load()), &refresh, Instant::now());
            self.status.plan(self.schedule.next);
            tokio::select! {
                () = tokio::time::sleep_until(self.schedule.next.into()) => {}
                changed = self.current.changed() => match changed {
                    // Other servers, or another /etc/resolv.conf.
                    Ok(()) => self.resolver = None,
                    Err(_) => return,
                },
                changed = tables.changed() => match changed {
                    Ok(()) => continue,
                    Err(_) => return,
                },
            }
            self.schedule.asks(any_fails(&table.load()));
            let answer = loop {
                let mut current = self.current.clone();
                tokio::select! {
                    answer = self.ask() => break answer,
                    // A look-up can take long: one that is out of date has no value.
                    changed = current.changed() => if changed.is_err() {
                        return;
                    },
                }
            };
            let table = table.load();
            for event in self.take(&answer, |id| fails(&table, id)) {
                if events.send(event).await.is_err() {
                    return;
                }
            }
        }
    }

    /// Asks once. Changed settings need another resolver; after failures, the file with the servers may have changed.
    async fn ask(&mut self) -> Answer {
        let failures = self.schedule.failures();
        if self.current.has_changed().unwrap_or_default() || failures > 0 && failures.is_multiple_of(FORGET) {
            self.resolver = None;
        }
        let settings = self.current.borrow_and_update().settings.clone();
        let resolver = self.resolver.take().map_or_else(|| Resolver::new(&settings), Ok);
        match resolver {
            Ok(resolver) => self.resolver.insert(resolver).ask(&settings.question, settings.family).await,
            Err(fault) => Answer::failed(fault),
        }
    }

    /// Takes in an answer. Returns what the publisher must hear of it.
    fn take(&mut self, answer: &Answer, fails: impl Fn(&str) -> bool) -> Vec<Event> {
        let Current { settings, rules } = self.current.borrow().clone();
        let now = Instant::now();
        let changes = self.members.learn(answer, &rules, fails, now);
        self.status.note(&self.pool, answer, &changes, self.members.count(), now);
        let chance = self.random.hash_one(now) as f64 / u64::MAX as f64;
        self.schedule.answered(answer, &self.members, &settings.refresh, rules.gone_after, chance, now);
        changes.events
    }
}

/// Whether a backend fails its checks or connects.
fn fails(table: &Table, id: &str) -> bool {
    let has_no_primary = table.is_exclusive() && !table.any_healthy();
    let fails = |state: State| FAILING.contains(&state) || (has_no_primary && state == State::Standby);
    table.backends().find(id).is_some_and(|backend| fails(backend.state))
}

/// Whether a backend fails its checks or connects. Its name may have another address by now.
fn any_fails(table: &Table) -> bool {
    let has_no_primary = table.is_exclusive() && !table.any_healthy();
    FAILING.into_iter().any(|state| table.backends().count(state) > 0)
        || (has_no_primary && table.backends().count(State::Standby) > 0)
}

/// Asks once, for `ringway check`.
pub async fn probe(settings: &Settings) -> Answer {
    match Resolver::new(settings) {
        Ok(resolver) => resolver.ask(&settings.question, settings.family).await,
        Err(fault) => Answer::failed(fault),
    }
}

/// What is wrong with a name, if anything.
pub fn name_fault(name: &str) -> Option<String> {
    let labels: Vec<_> = name.strip_suffix('.').unwrap_or(name).split('.').collect();
    let is_fine = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if name.is_empty() || name == "." {
        Some("is empty: write a name, like web.example.com.".to_owned())
    } else if name.parse::<std::net::IpAddr>().is_ok() {
        Some(format!("{name:?} is an address: use the provider static, or write a name"))
    } else if let Some((host, _)) = name.split_once(':') {
        Some(format!("{name:?} has a port: write {host:?} here, and the port in `port`"))
    } else if !name.is_ascii() {
        Some(format!("{name:?} has letters beyond ASCII: write the name in its ASCII form, which begins with xn--"))
    } else if labels.iter().any(|label| label.is_empty() || label.len() > 63 || !label.chars().all(is_fine)) {
        Some(format!(
            "{name:?} is not a DNS name: write labels of 1 to 63 letters, digits, - and _ with dots between them"
        ))
    } else if name.len() > 253 {
        Some(format!("{name:?} is longer than 253 characters"))
    } else {
        None
    }
}
