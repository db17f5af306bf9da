use proptest::prelude::*;

use super::*;

const POLICY: Policy = Policy {
    backoff: Duration::from_millis(200),
    max_backoff: Duration::from_secs(30),
    stable_after: Duration::from_secs(60),
    crash_loop_after: 5,
};

fn slots(count: usize, now: Instant) -> Vec<Slot> {
    (1..=count).map(|n| Slot::new(format!("echo-{n}").into(), now)).collect()
}

#[test]
fn empty_slots_are_filled_and_surplus_ones_stopped() {
    let now = Instant::now();
    let mut slots = slots(3, now);
    assert_eq!(plan(2, &slots, now), Plan { actions: vec![Action::Start(0), Action::Start(1)], wake: None });
    for slot in &mut slots {
        slot.started(now);
    }
    assert_eq!(plan(3, &slots, now).actions, []);
    assert_eq!(plan(2, &slots, now).actions, [Action::Stop(2)]);
    slots[2].stopping();
    assert_eq!(plan(2, &slots, now).actions, []);
}

#[test]
fn the_first_restart_is_at_once_and_further_ones_back_off() {
    let mut now = Instant::now();
    let mut slot = Slot::new("echo-1".into(), now);
    let mut waits = Vec::new();
    for _ in 0..12 {
        slot.started(now);
        waits.push(slot.ended(&POLICY, now));
        now += waits.last().copied().unwrap();
    }
    assert_eq!(waits[0], Duration::ZERO);
    for (n, wait) in waits.iter().enumerate().skip(1) {
        let full = POLICY.backoff.saturating_mul(1 << (n - 1)).min(POLICY.max_backoff);
        assert!(*wait <= full && *wait >= full * 4 / 5, "wait {n} is {wait:?} of {full:?}");
    }
    assert!(slot.is_crash_loop(&POLICY));
    slot.started(now);
    assert_eq!(
        slot.ended(&POLICY, now + POLICY.stable_after),
        Duration::ZERO,
        "a replica that lasted clears the record"
    );
    assert!(!slot.is_crash_loop(&POLICY));
}

#[test]
fn a_wait_is_announced() {
    let now = Instant::now();
    let mut slots = slots(1, now);
    slots[0].ended(&POLICY, now);
    let wait = slots[0].ended(&POLICY, now);
    assert_eq!(plan(1, &slots, now), Plan { actions: Vec::new(), wake: Some(now + wait) });
    assert_eq!(plan(1, &slots, now + wait).actions, [Action::Start(0)]);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Any history of deaths, failed starts and pauses: never a second replica in a slot, no storm of starts,
    /// and every slot filled again once nothing dies any more.
    #[test]
    fn histories_converge_without_a_storm(history in proptest::collection::vec((0_usize..3, 0_u64..5000, any::<bool>()), 1..200)) {
        let mut now = Instant::now();
        let began = now;
        let mut slots = slots(3, now);
        let mut up = [false; 3];
        let mut starts = 0_u32;
        let carry_out = |slots: &mut Vec<Slot>, up: &mut [bool; 3], now: Instant, fails: bool| {
            let mut done = 0;
            for action in plan(3, slots, now).actions {
                let Action::Start(n) = action else { unreachable!("nothing is surplus") };
                assert!(!up[n], "a second replica in slot {n}");
                done += 1;
                if fails {
                    slots[n].ended(&POLICY, now);
                } else {
                    slots[n].started(now);
                    up[n] = true;
                }
            }
            done
        };
        for (n, pause, fails) in history {
            starts += carry_out(&mut slots, &mut up, now, fails);
            now += Duration::from_millis(pause);
            if up[n] {
                up[n] = false;
                slots[n].ended(&POLICY, now);
            }
        }
        // A slot backs off to 80 % of 30 s at least, and gets there within 9 strikes.
        let most = 3 * (10 + (now - began).as_secs() / 24);
        prop_assert!(u64::from(starts) <= most, "{} starts in {:?}", starts, now - began);
        while let Some(wake) = plan(3, &slots, now).wake {
            now = wake;
            carry_out(&mut slots, &mut up, now, false);
        }
        carry_out(&mut slots, &mut up, now, false);
        prop_assert_eq!(up, [true; 3]);
    }
}
