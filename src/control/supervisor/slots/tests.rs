use super::*;
use crate::control::publisher::{self, Publisher};
use crate::control::supervisor::plan::{OnFailure, Order};

fn settings(replicas: u32) -> SlotSettings {
    SlotSettings {
        pool: "echo".into(),
        replicas,
        scaling: None,
        weights: BTreeMap::new(),
        drain: Duration::from_secs(30),
        pace: Pace {
            order: Order::StartFirst,
            parallel: 1,
            pause: Duration::ZERO,
            healthy_for: Duration::ZERO,
            on_failure: OnFailure::Rollback,
            drain: Duration::from_secs(30),
        },
        policy: Policy {
            backoff: Duration::from_millis(200),
            max_backoff: Duration::from_secs(30),
            stable_after: Duration::from_secs(60),
            crash_loop_after: 5,
            replace_after: None,
        },
    }
}

/// Slots whose second one drains as surplus, while the publisher shows no drain.
async fn draining() -> (Slots, mpsc::Receiver<Event>) {
    let joined = |id: &str| Event::Joined { id: id.into(), membership: Membership::weighing(1) };
    let known = vec![joined("echo-1"), joined("echo-2")];
    let publisher = Publisher::new("echo".into(), publisher::Settings::plain(), known, Instant::now());
    let (events, mut queue) = mpsc::channel(16);
    let mut slots = Slots::new(settings(1), publisher.table(), events, true);
    slots.extend(2);
    slots[Place::front(1)].running(false, Instant::now());
    slots.drain(Place::front(1), Why::Surplus).await;
    assert!(matches!(queue.try_recv(), Ok(Event::Leaving { .. })));
    (slots, queue)
}

#[tokio::test]
async fn a_drain_that_the_publisher_does_not_know_is_repeated() {
    let (mut slots, mut queue) = draining().await;
    assert!(slots.look_at_drains().await);
    assert!(matches!(queue.try_recv(), Ok(Event::Leaving { .. })));
}

#[tokio::test]
async fn the_drain_of_a_slot_that_is_wanted_again_is_not_repeated() {
    let (mut slots, mut queue) = draining().await;
    slots.configure(settings(2));
    assert!(slots.look_at_drains().await);
    assert!(queue.try_recv().is_err(), "the slot would leave although it is wanted");
}
