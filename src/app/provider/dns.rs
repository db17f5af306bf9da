//! The provider `dns`: the addresses of a name.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::source::{Prepared, ProviderStatus, Source, Update};
use crate::app::StartError;
use crate::app::context::PoolContext;
use crate::app::tasks::until;
use crate::config::{self, Provider};
use crate::control::Event;
use crate::control::provider::dns::answer::Outcome;
use crate::control::provider::dns::members::{Members, Rules};
use crate::control::provider::dns::status::DnsStatus;
use crate::control::provider::dns::{Current, Follower, Question, Settings, probe};

/// The channels to the task that asks.
#[derive(Debug)]
struct Followed {
    current: watch::Sender<Current>,
    retired: CancellationToken,
}

pub(super) async fn prepare(
    key_path: &str,
    pool: &config::Pool,
    settings: &Settings,
    context: &PoolContext<'_>,
) -> Result<Prepared, StartError> {
    let (current, received) = watch::channel(current(pool, settings));
    let question = settings.question.to_string();
    let known = context.known(&pool.name).filter(|named| named.name == question);
    let (members, mut known) =
        Members::inherited(known.map(|named| (Arc::clone(&named.id), named.address, named.membership)));
    let status = Arc::new(DnsStatus::new(&question, members.count(), Instant::now()));
    let mut follower = Follower::new(pool.name.as_str().into(), received, members, Arc::clone(&status));
    let (events, unanswered) = follower.begin().await;
    if let Some(error) = unanswered {
        let error = unfit(key_path, &format!("the look-up failed: {error}"));
        // A machine may start before its name server. A reload has a person who can mend the name.
        if !context.is_start {
            return Err(error);
        }
        tracing::warn!("{error}; the pool starts without backends, and Ringway asks again");
    }
    known.extend(events);
    let retired = CancellationToken::new();
    Ok(Prepared {
        source: Box::new(Followed { current, retired: retired.clone() }),
        known,
        status: ProviderStatus::Dns(status),
        start: Box::new(move |start| {
            let following = until(retired, follower.run(start.table, start.events));
            start.tasks.spawn(until(start.over, following));
        }),
    })
}

fn current(pool: &config::Pool, settings: &Settings) -> Current {
    let has_weights = matches!(settings.question, Question::Services { .. });
    let most = pool.most_backends();
    let rules = Rules { gone_after: settings.gone_after, drain: pool.drain, most, has_weights };
    Current { settings: settings.clone(), rules }
}

/// What a look-up of the name finds wrong now.
pub(super) async fn fault(key_path: &str, settings: &Settings) -> Option<StartError> {
    let answer = probe(settings).await;
    let problem = match (&answer.fault, answer.outcome()) {
        (Some(fault), _) => format!("the look-up failed: {fault}"),
        (None, Outcome::Empty) => "the name has no address, so the pool would start without backends".to_owned(),
        (None, _) => return None,
    };
    Some(unfit(key_path, &problem))
}

fn unfit(key_path: &str, problem: &str) -> StartError {
    StartError::Unfit { key_path: format!("{key_path}.provider.dns"), problem: problem.to_owned() }
}

impl Source for Followed {
    fn update(&mut self, update: &Update<'_>) -> Vec<Event> {
        if let Provider::Dns(settings) = &update.pool.provider {
            // Also without a change: a reload looks up the name at once, and reads /etc/resolv.conf again.
            self.current.send_replace(current(update.pool, settings));
        }
        Vec::new()
    }

    fn retire(&self) {
        self.retired.cancel();
    }
}
