//! Agents: programs beside the backends that say how many connections a backend should get, as in HAProxy.
//!
//! What an agent says only ever lowers what the weight, the checks and the operator allow. An agent that does not answer
//! [`PATIENCE`] questions in a row counts for nothing: its last words may be about a load that has gone.
//!
//! # Layout
//!
//! - this file: asks, and reports the answers
//! - [`words`]: the answers; pure

mod words;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;

use super::Event;
use crate::address::Address;
use crate::backend::{Advice, ConnectFailure};
use crate::labels::Label as _;
use crate::outgoing::{self, Outgoing};
use crate::table::{Members, TableCell};

/// Questions in a row without an answer after which what an agent has said no longer counts.
pub const PATIENCE: u32 = 3;

/// Questions of one pool that wait for an answer at the same time. Others wait for their turn.
const MOST: usize = 64;

/// Settings of a pool's agents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// TCP port of the agents, at the addresses of the backends.
    pub port: u16,
    /// Time from one question to the next.
    pub interval: Duration,
    /// Longest wait for an answer; at most the interval.
    pub timeout: Duration,
    /// What Ringway sends, with `{backend}` for the id; may be empty.
    pub send: String,
    /// Where the questions come from; `None`: the kernel decides.
    pub outgoing: Option<Arc<Outgoing>>,
}

/// An agent that Ringway asks.
#[derive(Debug)]
struct Agent {
    incarnation: u64,
    address: SocketAddr,
    /// When to ask next; `None` while it is asked.
    next: Option<Instant>,
    /// Questions in a row without an answer.
    unanswered: u32,
    advice: Option<Advice>,
    /// The publisher may not know the advice.
    must_tell: bool,
    /// Why the last question brought no advice.
    fault: Option<String>,
}

/// What came of a question to the agent of a backend.
#[derive(Debug)]
struct Answer {
    id: Arc<str>,
    incarnation: u64,
    /// The first line of the answer.
    line: Result<String, Fault>,
}

/// Why a question brought no advice.
#[derive(Debug)]
enum Fault {
    /// Ringway could not ask, which says nothing about the agent.
    NotDone(ConnectFailure),
    /// The agent has not answered, or not with words that Ringway knows.
    Unanswered(String),
}

impl From<std::io::Error> for Fault {
    fn from(error: std::io::Error) -> Self {
        match ConnectFailure::of(&error) {
            ours if ours.is_ours() => Self::NotDone(ours),
            _ => Self::Unanswered(error.to_string()),
        }
    }
}

/// The agents of a pool. Pure.
#[derive(Debug, Default)]
struct Agents {
    agents: HashMap<Arc<str>, Agent>,
    roster: Option<u64>,
}

/// Asks the agents of the backends of `table` until the task is dropped.
pub async fn ask_all(
    pool: Arc<str>,
    table: TableCell,
    mut settings: watch::Receiver<Option<Settings>>,
    events: mpsc::Sender<Event>,
) {
    let mut changes = table.watch();
    let mut current = settings.borrow_and_update().clone();
    let (mut agents, mut running) = (Agents::default(), JoinSet::new());
    let turns = Arc::new(Semaphore::new(MOST));
    loop {
        let news = if let Some(settings) = &current {
            agents.follow(table.load().backends(), settings, Instant::now());
            Vec::new()
        } else {
            // Whoever no longer asks must take back what was said.
            agents.retire()
        };
        for event in news {
            if events.send(event).await.is_err() {
                return;
            }
        }
        let next = agents.next();
        let is_due = tokio::time::sleep_until(next.unwrap_or_else(Instant::now).into());
        tokio::select! {
            changed = changes.changed() => if changed.is_err() {
                return;
            },
            changed = settings.changed() => {
                if changed.is_err() {
                    return;
                }
                current.clone_from(&settings.borrow_and_update());
                // Dropping the questions ends them.
                running = JoinSet::new();
                agents.hurry(Instant::now());
            }
            Some(done) = running.join_next() => {
                // A question that panicked is a bug, and ends this task too.
                let answer = done.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()));
                let Some(settings) = &current else { continue };
                if let Some(event) = agents.answered(&pool, answer, settings, Instant::now())
                    && events.send(event).await.is_err()
                {
                    return;
                }
            }
            () = is_due, if next.is_some() => {
                let Some(settings) = &current else { continue };
                for (id, incarnation, address) in agents.due(settings, Instant::now()) {
                    let (settings, turns) = (settings.clone(), Arc::clone(&turns));
                    running.spawn(async move {
                        // Nobody closes the semaphore.
                        let _turn = turns.acquire_owned().await;
                        let asked = tokio::time::timeout(settings.timeout, ask(address, &settings, &id)).await;
                        let line = asked.unwrap_or_else(|_elapsed| Err(Fault::Unanswered("timeout".to_owned())));
                        Answer { id, incarnation, line }
                    });
                }
            }
        }
    }
}

/// Asks one agent. Returns the first line of its answer.
async fn ask(address: SocketAddr, settings: &Settings, id: &str) -> Result<String, Fault> {
    let mut stream = outgoing::connect(address, settings.outgoing.as_deref(), id.as_bytes(), |_| ()).await?;
    // An agent may answer and close without reading the question. Its answer counts all the same.
    let _ = stream.write_all(settings.send.replace("{backend}", id).as_bytes()).await;
    let mut answer = Vec::new();
    let end = loop {
        match stream.read_buf(&mut answer).await {
            Ok(0) => break "the agent closed the connection without an answer".to_owned(),
            Ok(_) if answer.len() >= words::LONGEST || answer.contains(&b'\n') => break String::new(),
            Ok(_) => {}
            Err(error) => break error.to_string(),
        }
    };
    if answer.is_empty() {
        return Err(Fault::Unanswered(end));
    }
    answer.truncate(words::LONGEST);
    Ok(words::first_line(&answer))
}

impl Agents {
    /// Follows the table: asks new backends, and forgets those that have gone.
    fn follow(&mut self, members: &Members, settings: &Settings, now: Instant) {
        if self.roster.replace(members.roster()) == Some(members.roster()) {
            return;
        }
        // A replica keeps its incarnation if it gets the id of its slot.
        let before = self.agents.drain();
        let mut before: HashMap<_, _> = before.map(|(id, agent)| (agent.incarnation, (id, agent))).collect();
        for backend in members {
            let Some(Address::Ip(mut address)) = backend.address.clone() else { continue };
            address.set_port(settings.port);
            let known = before.remove(&backend.incarnation).map(|(id, agent)| {
                // An answer to a question under the other id counts for nothing.
                if id == backend.id { agent } else { Agent { next: Some(now), must_tell: true, ..agent } }
            });
            let agent = known.unwrap_or_else(|| {
                // Agents of one pool are not all asked at the same moment.
                let chance = seahash::hash(backend.id.as_bytes()) as f64 / u64::MAX as f64;
                Agent {
                    incarnation: backend.incarnation,
                    address,
                    next: Some(now + settings.interval.mul_f64(chance / 4.0)),
                    unanswered: 0,
                    advice: None,
                    must_tell: false,
                    fault: None,
                }
            });
            self.agents.insert(Arc::clone(&backend.id), agent);
        }
    }

    /// Forgets all agents. Returns what takes their advice back.
    fn retire(&mut self) -> Vec<Event> {
        self.roster = None;
        let advised = self.agents.drain().filter(|(_, agent)| agent.advice.is_some());
        advised.map(|(id, agent)| Event::Advised { id, incarnation: agent.incarnation, advice: None }).collect()
    }

    /// Asks all at once, at another port perhaps.
    fn hurry(&mut self, now: Instant) {
        self.roster = None;
        self.agents.values_mut().for_each(|agent| agent.next = Some(now));
    }

    /// When the next question is due.
    fn next(&self) -> Option<Instant> {
        self.agents.values().filter_map(|agent| agent.next).min()
    }

    /// The agents to ask now. Each is asked once at a time.
    fn due(&mut self, settings: &Settings, now: Instant) -> Vec<(Arc<str>, u64, SocketAddr)> {
        let due = self.agents.iter_mut().filter(|(_, agent)| agent.next.is_some_and(|at| at <= now));
        due.map(|(id, agent)| {
            agent.next = None;
            agent.address.set_port(settings.port);
            (Arc::clone(id), agent.incarnation, agent.address)
        })
        .collect()
    }

    /// Takes in an answer. Returns what the publisher does not know yet.
    fn answered(&mut self, pool: &str, answer: Answer, settings: &Settings, now: Instant) -> Option<Event> {
        let Answer { id, incarnation, line } = answer;
        let agent = self.agents.get_mut(&id).filter(|agent| agent.incarnation == incarnation)?;
        agent.next = Some(now + settings.interval);
        let advice = match line {
            Ok(line) => words::advice(&line, agent.advice.as_ref()).map_err(Fault::Unanswered),
            Err(fault) => Err(fault),
        };
        let before = agent.advice.clone();
        match advice {
            Ok(advice) => {
                if agent.fault.take().is_some() {
                    tracing::info!(%pool, %id, answer = &*advice.text, "the agent answers again");
                }
                agent.unanswered = 0;
                agent.advice = Some(advice);
            }
            Err(Fault::NotDone(why)) => {
                tracing::debug!(%pool, %id, why = why.as_str(), "could not ask the agent");
            }
            Err(Fault::Unanswered(fault)) => {
                if agent.fault.is_none() {
                    tracing::warn!(%pool, %id, address = %agent.address, "no advice from the agent: {fault}");
                }
                agent.fault = Some(fault);
                agent.unanswered = agent.unanswered.saturating_add(1);
                if agent.unanswered >= PATIENCE {
                    agent.advice = None;
                }
            }
        }
        // Another description changes nothing, and each event publishes a table.
        let is_same = match (&before, &agent.advice) {
            (Some(before), Some(advice)) => before.is_like(advice),
            (before, advice) => before.is_none() && advice.is_none(),
        };
        let advice = agent.advice.clone().map(Arc::new);
        (!is_same || std::mem::take(&mut agent.must_tell)).then_some(Event::Advised { id, incarnation, advice })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Backend, Membership};
    use crate::control::publisher::{self, Publisher};

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn what_an_agent_has_said_counts_until_three_questions_have_no_answer() {
        let settings = Settings { port: 9, interval: 2 * SECOND, timeout: SECOND, send: String::new(), outgoing: None };
        let address = Address::Ip(([127, 0, 0, 1], 1).into());
        let known = [
            Event::Joined { id: "a".into(), membership: Membership::weighing(1) },
            Event::Started { id: "a".into(), address, replica: None },
        ];
        let publisher = Publisher::new("p".into(), publisher::Settings::plain(), known, Instant::now());
        let (mut agents, begin) = (Agents::default(), Instant::now());
        agents.follow(publisher.table().load().backends(), &settings, begin);
        let mut now = begin;
        let answer = |line| Answer { id: "a".into(), incarnation: 1, line };
        let mut step = |line: Result<&str, Fault>| {
            now = agents.next().unwrap();
            let due = agents.due(&settings, now);
            assert_eq!(due, [("a".into(), 1, ([127, 0, 0, 1], 9).into())]);
            assert!(agents.due(&settings, now + 9 * SECOND).is_empty(), "one question at a time");
            let event = agents.answered("p", answer(line.map(str::to_owned)), &settings, now)?;
            let Event::Advised { advice, .. } = event else { panic!("{event:?}") };
            Some(advice.map(|advice| (advice.part.as_part(), advice.is_down)))
        };
        let silence = || Err(Fault::Unanswered("timeout".to_owned()));
        let busy = || Err(Fault::NotDone(ConnectFailure::NoDescriptors));
        assert_eq!(step(silence()), None);
        assert_eq!(step(Ok("50%")), Some(Some((0.5, false))));
        assert_eq!(step(Ok("50% # load 0.3")), None, "a description is no news");
        assert_eq!(step(Ok("down")), Some(Some((0.5, true))));
        assert_eq!(step(silence()), None);
        assert_eq!(step(Ok("what?")), None);
        for _ in 0..5 {
            assert_eq!(step(busy()), None, "the agent is not silent");
        }
        assert_eq!(step(silence()), Some(None));
        assert_eq!(step(silence()), None);
        assert_eq!(step(Ok("up")), Some(Some((1.0, false))), "nothing of the earlier words is left");
        let retired = agents.retire();
        assert!(matches!(&retired[..], [Event::Advised { advice: None, .. }]));
        assert!(agents.answered("p", answer(Ok("50%".to_owned())), &settings, now).is_none());
    }

    /// An answer under the id beside a slot may come too late for the publisher.
    #[test]
    fn an_agent_that_gets_the_id_of_its_slot_is_asked_at_once_and_its_answer_told_again() {
        let settings = Settings { port: 9, interval: 2 * SECOND, timeout: SECOND, send: String::new(), outgoing: None };
        let known = [("a", 1), ("a+", 2)].into_iter().flat_map(|(id, port)| {
            let address = Address::Ip(([127, 0, 0, 1], port).into());
            let membership = Membership::weighing(1);
            [Event::Joined { id: id.into(), membership }, Event::Started { id: id.into(), address, replica: None }]
        });
        let publisher = Publisher::new("p".into(), publisher::Settings::plain(), known, Instant::now());
        let (members, now) = (publisher.table().load().backends().clone(), Instant::now());
        let mut agents = Agents::default();
        agents.follow(&members, &settings, now);
        let mut later = now + SECOND;
        let answer = |id: &str, incarnation| Answer { id: id.into(), incarnation, line: Ok("50%".to_owned()) };
        assert_eq!(agents.due(&settings, later).len(), 2);
        assert!(agents.answered("p", answer("a+", 2), &settings, later).is_some());
        let other = |one: usize, of: usize| Backend { id: Arc::clone(&members[one].id), ..members[of].clone() };
        agents.follow(&Members::new([other(0, 1), other(1, 0)], members.roster() + 1), &settings, later);
        assert!(agents.due(&settings, later).iter().any(|(id, incarnation, _)| (&**id, *incarnation) == ("a", 2)));
        assert!(agents.answered("p", answer("a", 2), &settings, later).is_some(), "the same advice, told again");
        later += 3 * SECOND;
        agents.due(&settings, later);
        assert!(agents.answered("p", answer("a", 2), &settings, later).is_none(), "once");
    }
}
