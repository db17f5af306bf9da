//! `GET /api/stream`: the status as server-sent events, once a second. The first event has everything, each later one what has changed.
//!
//! All clients share one [`Frame`] of each second. A client that reads slowly gets fewer events: the next one is made when the last
//! one has been sent.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Extension;
use axum::extract::State as Extract;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::sse::{Event as Message, Sse};
use axum::response::{IntoResponse as _, Response};
use futures_util::stream::unfold;
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Interval, MissedTickBehavior, interval};

use super::State;
use super::error::Error;
use super::server::AtWork;
use super::status::{Member, Status};
use crate::events::Event;

/// Clients at the same time. Further ones ask for the status instead.
pub(super) const MOST: usize = 8;

/// Time between two events.
const STEP: Duration = Duration::from_secs(1);

/// Age at which a stream ends, and the client asks again. Less than the age at which the server ends a connection.
const LONGEST: Duration = Duration::from_secs(480);

/// Streams that began together do not end together: they last up to this time longer.
const JITTER_SECONDS: u64 = 60;

/// The last frame, which all streams share.
#[derive(Debug, Default)]
pub(super) struct Frames(Mutex<Option<(Instant, Arc<Frame>)>>);

/// The status at a moment, as JSON.
#[derive(Debug)]
struct Frame {
    /// With empty lists of backends.
    status: Box<RawValue>,
    pools: Vec<PoolFrame>,
}

#[derive(Debug)]
struct PoolFrame {
    name: String,
    ids: Arc<[String]>,
    members: Vec<Box<RawValue>>,
    /// A hash of each member, without times that pass by themselves.
    hashes: Arc<HashMap<String, u64>>,
}

/// The ids of a pool's backends, and a hash of each backend.
struct Known {
    ids: Arc<[String]>,
    hashes: Arc<HashMap<String, u64>>,
}

/// What one client knows.
struct Follower {
    state: Arc<State>,
    ticks: Interval,
    ends: Instant,
    /// What it knows of each pool.
    known: HashMap<String, Known>,
    /// Number of the last event that the client has.
    event: u64,
    _permit: OwnedSemaphorePermit,
    /// An idle connection would make room for others.
    _at_work: Option<Extension<Arc<AtWork>>>,
}

/// One event of the stream.
#[derive(Debug, Serialize)]
struct Change<'a> {
    /// The status with empty lists of backends.
    status: &'a RawValue,
    /// The backends that have changed, by pool.
    changed: BTreeMap<&'a str, Vec<&'a RawValue>>,
    /// The ids of all backends of the pools whose backends come, go or change their order.
    members: BTreeMap<&'a str, &'a [String]>,
    events: Vec<Arc<Event>>,
}

pub(super) async fn get(
    Extract(state): Extract<Arc<State>>,
    at_work: Option<Extension<Arc<AtWork>>>,
) -> Result<Response, Error> {
    let Ok(permit) = Arc::clone(&state.streams).try_acquire_owned() else {
        let message = format!("{MOST} clients follow the status already: call /api/status instead");
        return Err(Error::new(StatusCode::SERVICE_UNAVAILABLE, "too_many_streams", message));
    };
    let mut ticks = interval(STEP);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let stop = state.stopping.clone();
    let longer = Duration::from_secs(RandomState::new().hash_one(0) % JITTER_SECONDS);
    let ends = Instant::now() + LONGEST + longer;
    let known = HashMap::new();
    let follower = Follower { state, ticks, ends, known, event: 0, _permit: permit, _at_work: at_work };
    let changes = unfold((follower, stop), |(mut follower, stop)| async {
        stop.run_until_cancelled(follower.ticks.tick()).await?;
        let message = follower.change()?;
        Some((Ok::<_, Infallible>(Message::default().data(message)), (follower, stop)))
    });
    let mut response = Sse::new(changes).into_response();
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

impl Follower {
    /// What has changed for this client, as JSON; `None`: the stream ends.
    fn change(&mut self) -> Option<String> {
        if Instant::now() >= self.ends {
            return None;
        }
        let frame = self.state.frames.now(&self.state);
        let (mut changed, mut members) = (BTreeMap::new(), BTreeMap::new());
        for pool in &frame.pools {
            let before = {
                let known = Known { ids: Arc::clone(&pool.ids), hashes: Arc::clone(&pool.hashes) };
                self.known.insert(pool.name.clone(), known)
            };
            let is_new = |id: &String| before.as_ref().and_then(|before| before.hashes.get(id)) != pool.hashes.get(id);
            let new = std::iter::zip(&*pool.ids, &pool.members).filter(|(id, _)| is_new(id));
            changed.insert(pool.name.as_str(), new.map(|(_, member)| &**member).collect::<Vec<_>>());
            if before.as_ref().is_none_or(|before| before.ids != pool.ids) {
                members.insert(pool.name.as_str(), &*pool.ids);
            }
        }
        self.known.retain(|name, _| frame.pools.iter().any(|pool| pool.name == *name));
        let events = self.state.events.after(self.event);
        self.event = events.last().map_or(self.event, |event| event.number);
        let change = Change { status: &frame.status, changed, members, events };
        // Text and numbers always serialize.
        Some(serde_json::to_string(&change).unwrap_or_default())
    }
}

impl Frames {
    /// The frame of this second.
    fn now(&self, state: &State) -> Arc<Frame> {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, frame)) = last.as_ref().filter(|(at, _)| at.elapsed() < STEP / 2) {
            return Arc::clone(frame);
        }
        let frame = Arc::new(Frame::of(Status::of(state)));
        *last = Some((Instant::now(), Arc::clone(&frame)));
        frame
    }
}

impl Frame {
    fn of(mut status: Status) -> Self {
        let uptime = status.uptime_seconds;
        let pools = status.pools.iter_mut().map(|pool| {
            let backends = std::mem::take(&mut pool.backends);
            let hashes = backends.iter().map(|member| (member.id.clone(), hash(member, uptime))).collect();
            PoolFrame {
                name: pool.name.clone(),
                ids: backends.iter().map(|member| member.id.clone()).collect(),
                members: backends.iter().map(raw).collect(),
                hashes: Arc::new(hashes),
            }
        });
        let pools = pools.collect();
        Self { status: raw(&status), pools }
    }
}

fn raw(value: &impl Serialize) -> Box<RawValue> {
    // Text and numbers always serialize.
    to_raw_value(value).unwrap_or_else(|_| RawValue::NULL.to_owned())
}

/// A hash of all that a client shows. In place of times that pass by themselves, it has the moments from which they count.
fn hash(member: &Member, uptime: f64) -> u64 {
    let mut member = member.clone();
    let mut moments = vec![uptime - std::mem::take(&mut member.health.since_seconds)];
    moments.extend(member.last_exit.as_mut().map(|exit| uptime - std::mem::take(&mut exit.seconds_ago)));
    if let Some(drain) = &mut member.drain {
        moments.push(uptime - std::mem::take(&mut drain.since_seconds));
        moments.extend(drain.deadline_in_seconds.take().map(|left| uptime + left));
    }
    let moments: Vec<String> = moments.iter().map(|moment| format!("{moment:.0}")).collect();
    let text = serde_json::to_string(&member).unwrap_or_default() + &moments.join(" ");
    seahash::hash(text.as_bytes())
}
