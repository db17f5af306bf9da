//! The provider `dns`: the addresses of a name.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;

use super::source::{Prepared, ProviderStatus, Source, Update};
use crate::app::StartError;
use crate::app::context::PoolContext;
use crate::app::tasks::until;
use crate::config::{self, Provider};
use crate::control::Event;
use crate::control::provider::dns::lookup::Outcome;
use crate::control::provider::dns::members::Members;
use crate::control::provider::dns::status::DnsStatus;
use crate::control::provider::dns::{Current, Follower, Settings, probe};

/// The channel to the task that asks.
#[derive(Debug)]
struct Names {
    current: watch::Sender<Current>,
}

pub(super) async fn prepare(pool: &config::Pool, settings: &Settings, context: &PoolContext<'_>) -> Prepared {
    let (current, received) = watch::channel((settings.clone(), pool.drain));
    let question = settings.question.to_string();
    let status = Arc::new(DnsStatus::new(&question, Instant::now()));
    let known = context.known(&pool.name).filter(|named| named.name == question);
    let (members, mut known) =
        Members::inherited(known.map(|named| (Arc::clone(&named.id), named.address, named.weight)));
    let mut follower = Follower::new(pool.name.as_str().into(), received, members, Arc::clone(&status));
    known.extend(follower.begin().await);
    Prepared {
        source: Box::new(Names { current }),
        known,
        status: ProviderStatus::Dns(status),
        start: Box::new(move |start| start.tasks.spawn(until(start.over, follower.run(start.table, start.events)))),
    }
}

/// What a look-up of the name finds wrong now.
pub(super) async fn fault(key_path: &str, settings: &Settings) -> Option<StartError> {
    let answer = probe(settings).await;
    let problem = match (&answer.fault, answer.outcome()) {
        (Some(fault), _) => format!("the look-up failed: {fault}; the pool would start without backends"),
        (None, Outcome::Empty) => "the name has no address; the pool would start without backends".to_owned(),
        (None, _) => return None,
    };
    Some(StartError::Unfit { key_path: format!("{key_path}.provider.dns"), problem })
}

impl Source for Names {
    fn update(&mut self, update: &Update<'_>) -> Vec<Event> {
        if let Provider::Dns(settings) = &update.pool.provider {
            // Also without a change: a reload looks up the name at once, and reads /etc/resolv.conf again.
            self.current.send_replace((Settings::clone(settings), update.pool.drain));
        }
        Vec::new()
    }
}
