//! `GET /api/stream`: the status as server-sent events, once a second. The first event has everything, each later one what has changed.
//!
//! A client that reads slowly gets fewer events: the next one is made when the last one has been sent.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;

use axum::extract::State as Extract;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::sse::{Event as Message, Sse};
use axum::response::{IntoResponse as _, Response};
use futures_util::stream::unfold;
use serde::Serialize;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Interval, MissedTickBehavior, interval};

use super::State;
use super::error::Error;
use super::history::STEP;
use super::status::{Member, Status};
use crate::events::Event;

/// Clients at the same time. Further ones ask for the status instead.
pub(super) const MOST: usize = 8;

/// What one client knows.
struct Follower {
    state: Arc<State>,
    ticks: Interval,
    /// Hashes of the backends that the client has.
    known: HashMap<(String, String), u64>,
    /// Number of the last event that the client has.
    event: u64,
    _permit: OwnedSemaphorePermit,
}

/// One event of the stream: the status without the backends that have not changed.
#[derive(Debug, Serialize)]
struct Change {
    #[serde(flatten)]
    status: Status,
    /// Ids of all backends of each pool, in their order, so the client notices those that have left.
    members: HashMap<String, Vec<String>>,
    /// New connections per second, of each pool.
    rates: HashMap<String, f32>,
    /// New connections per second of the backends that have any, by pool and id.
    backend_rates: HashMap<String, HashMap<String, f32>>,
    events: Vec<Event>,
}

pub(super) async fn get(Extract(state): Extract<Arc<State>>) -> Result<Response, Error> {
    let Ok(permit) = Arc::clone(&state.streams).try_acquire_owned() else {
        let message = format!("{MOST} clients follow the status already: call /api/status instead");
        return Err(Error::new(StatusCode::SERVICE_UNAVAILABLE, "too_many_streams", message));
    };
    let mut ticks = interval(STEP);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let stop = state.stopping.clone();
    let follower = Follower { state, ticks, known: HashMap::new(), event: 0, _permit: permit };
    let changes = unfold((follower, stop), |(mut follower, stop)| async {
        stop.run_until_cancelled(follower.ticks.tick()).await?;
        let change = follower.change();
        // Text and numbers always serialize.
        let message = Message::default().data(serde_json::to_string(&change).unwrap_or_default());
        Some((Ok::<_, Infallible>(message), (follower, stop)))
    });
    let mut response = Sse::new(changes).into_response();
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

impl Follower {
    fn change(&mut self) -> Change {
        let mut status = Status::of(&self.state);
        let (mut members, mut rates, mut backend_rates) = (HashMap::new(), HashMap::new(), HashMap::new());
        for pool in &mut status.pools {
            let name = pool.name.clone();
            members.insert(name.clone(), pool.backends.iter().map(|member| member.id.clone()).collect());
            if let Some(history) = &self.state.history {
                rates.extend(history.last(&name, None).map(|rate| (name.clone(), rate)));
                let of = |member: &Member| {
                    Some((member.id.clone(), history.last(&name, Some(&member.id)).filter(|&rate| rate > 0.0)?))
                };
                backend_rates.insert(name.clone(), pool.backends.iter().filter_map(of).collect());
            }
            pool.backends.retain(|member| {
                let hash = hash(member);
                self.known.insert((name.clone(), member.id.clone()), hash) != Some(hash)
            });
        }
        self.known.retain(|(pool, id), _| members.get(pool).is_some_and(|ids: &Vec<String>| ids.contains(id)));
        let events: Vec<_> = self.state.events.after(self.event).iter().map(|event| Event::clone(event)).collect();
        self.event = events.last().map_or(self.event, |event| event.number);
        Change { status, members, rates, backend_rates, events }
    }
}

/// A hash of all that the client shows, without times that pass by themselves.
fn hash(member: &Member) -> u64 {
    let mut value = serde_json::to_value(member).unwrap_or_default();
    for time in
        ["/health/since_seconds", "/last_exit/seconds_ago", "/drain/since_seconds", "/drain/deadline_in_seconds"]
    {
        if let Some(time) = value.pointer_mut(time) {
            *time = serde_json::Value::Null;
        }
    }
    seahash::hash(value.to_string().as_bytes())
}
