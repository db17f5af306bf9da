use super::answer::{Fault, Found, Outcome};
use super::members::{Changes, Rules};
use super::*;
use crate::backend::Membership;

const GONE_AFTER: Duration = Duration::from_secs(30);
const RULES: Rules = Rules { gone_after: GONE_AFTER, drain: Duration::from_secs(5), most: 1000, has_weights: false };
const REFRESH: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(30);

fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

fn backend(n: u8) -> Found {
    let address = SocketAddr::from(([10, 0, 0, n], 80));
    Found { id: address.to_string().into(), addresses: vec![address], is_partial: false, rank: (0, 0) }
}

/// A target of SRV records. Without an address, its own look-up has failed.
fn target(name: &str, addresses: &[u8], priority: u16, weight: u16) -> Found {
    let addresses: Vec<_> = addresses.iter().map(|&n| SocketAddr::from(([10, 0, 0, n], 80))).collect();
    Found { id: name.into(), is_partial: addresses.is_empty(), addresses, rank: (priority, weight) }
}

fn answer(found: impl IntoIterator<Item = Found>) -> Answer {
    let found = found.into_iter().map(|found| (Arc::clone(&found.id), found)).collect();
    Answer { found, is_complete: true, ttl: Some(seconds(10)), fault: None }
}

fn failed(outcome: Outcome) -> Answer {
    Answer::failed(Fault { outcome, text: "no".to_owned() })
}

/// An answer that does not say who is gone.
fn part(answer: Answer) -> Answer {
    Answer { is_complete: false, fault: failed(Outcome::Timeout).fault, ..answer }
}

/// Members and a clock that a test moves.
struct Bench {
    members: Members,
    rules: Rules,
    now: Instant,
    /// The backend that fails.
    failing: &'static str,
}

impl Bench {
    fn new() -> Self {
        Self::with(Members::default())
    }

    fn with(members: Members) -> Self {
        Self { members, rules: RULES, now: Instant::now(), failing: "" }
    }

    /// A bench for SRV records.
    fn of_services() -> Self {
        Self { rules: Rules { has_weights: true, ..RULES }, ..Self::new() }
    }

    fn learn(&mut self, answer: &Answer) -> Changes {
        self.members.learn(answer, &self.rules, |id| id == self.failing, self.now)
    }

    /// The events of an answer, in words.
    fn words(&mut self, answer: &Answer) -> Vec<String> {
        let events = self.learn(answer).events;
        let words = events.into_iter().map(|event| match event {
            Event::Joined { id, membership: Membership { weight, tier: 0, .. } } => {
                format!("{id} joined with {weight}")
            }
            Event::Joined { id, membership: Membership { weight, tier, .. } } => {
                format!("{id} joined tier {tier} with {weight}")
            }
            Event::Started { id, address, .. } => format!("{id} is at {address}"),
            Event::Leaving { id, within } => format!("{id} leaves within {within:?}"),
            other => format!("{other:?}"),
        });
        words.collect()
    }
}

#[test]
fn the_order_and_the_repeats_of_an_answer_change_nothing() {
    let mut bench = Bench::new();
    assert_eq!(bench.learn(&answer([3, 1, 2].map(backend))).joined, 3);
    for _ in 0..100 {
        bench.now += seconds(10);
        assert!(bench.learn(&answer([2, 3, 1, 1].map(backend))).events.is_empty());
    }
}

#[test]
fn failed_look_ups_remove_nothing_however_long_they_fail() {
    let mut bench = Bench::new();
    bench.learn(&answer([1, 2].map(backend)));
    let kinds = [Outcome::Timeout, Outcome::ServerFailure, Outcome::Refused, Outcome::Truncated, Outcome::Failed];
    for n in 0..10_000 {
        bench.now += seconds(10);
        assert!(bench.learn(&failed(kinds[n % kinds.len()])).events.is_empty());
    }
    assert_eq!(bench.members.count(), 2);
}

#[test]
fn a_part_of_an_answer_adds_and_does_not_remove() {
    let mut bench = Bench::new();
    bench.learn(&answer([1, 2].map(backend)));
    for _ in 0..10 {
        bench.now += GONE_AFTER;
        bench.learn(&part(answer([2, 3].map(backend))));
    }
    assert_eq!(bench.members.count(), 3);
}

#[test]
fn a_backend_leaves_when_complete_answers_have_missed_it_for_long_enough() {
    let mut bench = Bench::new();
    bench.learn(&answer([1, 2].map(backend)));
    bench.now += seconds(10);
    assert!(bench.words(&answer([1].map(backend))).is_empty());
    // It was back for a moment: the time starts again.
    bench.now += seconds(20);
    assert!(bench.words(&answer([1, 2].map(backend))).is_empty());
    bench.now += seconds(1);
    assert!(bench.words(&answer([1].map(backend))).is_empty());
    bench.now += seconds(29);
    assert!(bench.words(&answer([1].map(backend))).is_empty());
    bench.now += seconds(1);
    assert_eq!(bench.words(&answer([1].map(backend))), ["10.0.0.2:80 leaves within 5s"]);
    // It can come back, and needs its address again.
    assert_eq!(
        bench.words(&answer([1, 2].map(backend))),
        ["10.0.0.2:80 joined with 1", "10.0.0.2:80 is at 10.0.0.2:80"]
    );
}

/// A name server that goes down and comes back may answer with nothing at both moments.
#[test]
fn the_time_of_an_outage_does_not_count() {
    let mut bench = Bench::new();
    bench.learn(&answer([1, 2].map(backend)));
    bench.learn(&answer([]));
    bench.now += seconds(20);
    bench.learn(&answer([]));
    for _ in 0..100 {
        bench.now += seconds(10);
        assert!(bench.words(&failed(Outcome::ServerFailure)).is_empty());
    }
    bench.now += seconds(5);
    assert!(bench.words(&answer([])).is_empty());
    bench.now += seconds(5);
    assert_eq!(bench.learn(&answer([])).left, 2);
}

#[test]
fn a_name_that_does_not_exist_for_a_moment_loses_nothing() {
    let mut bench = Bench::new();
    bench.learn(&answer([1, 2].map(backend)));
    for _ in 0..20 {
        bench.now += seconds(1);
        assert!(bench.words(&answer([])).is_empty());
    }
    assert!(bench.words(&answer([1, 2].map(backend))).is_empty());
    bench.words(&answer([]));
    bench.now += GONE_AFTER;
    assert_eq!(bench.learn(&answer([])).left, 2);
}

#[test]
fn answers_that_rotate_a_part_of_the_addresses_lead_to_all_of_them() {
    let mut bench = Bench::new();
    let mut leaves = 0;
    for round in 0..300_u32 {
        bench.now += seconds(1);
        let part = (0..8).map(|n| backend(((round * 8 + n) % 20) as u8));
        leaves += bench.learn(&answer(part)).left;
    }
    assert_eq!((bench.members.count(), leaves), (20, 0));
}

#[test]
fn a_target_keeps_its_identity_when_its_address_changes() {
    let mut bench = Bench::of_services();
    let one = |addresses: &[u8]| answer([target("a", addresses, 0, 0)]);
    assert_eq!(bench.words(&one(&[1])), ["a joined with 16", "a is at 10.0.0.1:80"]);
    // While the backend works, one answer without its address is not enough.
    assert!(bench.words(&one(&[2])).is_empty());
    assert!(bench.words(&one(&[1, 2])).is_empty());
    assert!(bench.words(&one(&[2])).is_empty());
    assert_eq!(bench.words(&one(&[2])), ["a is at 10.0.0.2:80"]);
    // One that fails moves at once, and tries all of its addresses in turn.
    bench.failing = "a";
    assert_eq!(bench.words(&one(&[3])), ["a is at 10.0.0.3:80"]);
    for n in [4, 5, 3, 4] {
        assert_eq!(bench.words(&one(&[3, 4, 5])), [format!("a is at 10.0.0.{n}:80")]);
    }
    bench.failing = "";
    assert!(bench.words(&one(&[3, 4, 5])).is_empty());
}

#[test]
fn a_target_whose_own_look_up_fails_is_there() {
    let mut bench = Bench::of_services();
    bench.learn(&answer([target("a", &[1], 0, 0), target("old", &[2], 0, 0)]));
    let found = [target("a", &[], 0, 0), target("b", &[], 0, 0)];
    let lame = Answer { fault: failed(Outcome::ServerFailure).fault, ..answer(found) };
    assert_eq!(bench.words(&lame), ["b joined with 16"]);
    // It does not keep others from leaving.
    bench.now += GONE_AFTER;
    assert_eq!(bench.words(&lame), ["old leaves within 5s"]);
    assert_eq!(bench.words(&answer([target("a", &[1], 0, 0), target("b", &[4], 0, 0)])), ["b is at 10.0.0.4:80"]);
}

#[test]
fn weights_are_compared_with_those_of_all_backends_that_are_there() {
    let mut bench = Bench::of_services();
    let found = |weights: &[(&str, u16)]| answer(weights.iter().map(|(name, weight)| target(name, &[1], 0, *weight)));
    bench.learn(&found(&[("a", 100), ("b", 50), ("c", 0)]));
    let weights = |bench: &mut Bench, answer: &Answer| {
        let mut words = bench.words(answer);
        words.retain(|word| word.contains("joined"));
        words
    };
    // The heaviest is missing for a moment.
    assert!(bench.words(&found(&[("b", 50), ("c", 0)])).is_empty());
    assert!(bench.words(&found(&[("a", 100), ("b", 50), ("c", 0)])).is_empty());
    assert_eq!(weights(&mut bench, &found(&[("a", 100), ("b", 25), ("c", 1)])), ["b joined with 4"]);
    assert_eq!(weights(&mut bench, &found(&[("a", 0), ("b", 0), ("c", 0)])), ["b joined with 16", "c joined with 16"]);
    // Equal weights are equal, whatever they are: CoreDNS shares 100 among the pods.
    assert!(bench.words(&found(&[("a", 33), ("b", 33), ("c", 33)])).is_empty());
}

#[test]
fn a_priority_is_a_tier_with_weights_of_its_own() {
    let mut bench = Bench::of_services();
    let (main, spare) = (target("main", &[1], 1, 10), target("spare", &[2], 2, 1000));
    assert_eq!(
        bench.words(&answer([main.clone(), spare.clone()])),
        [
            "main joined tier 1 with 16",
            "main is at 10.0.0.1:80",
            "spare joined tier 2 with 16",
            "spare is at 10.0.0.2:80"
        ]
    );
    assert_eq!(bench.words(&answer([main, target("spare", &[2], 0, 5)])), ["spare joined with 16"]);
}

#[test]
fn a_pool_has_a_limit_and_the_same_backends_in_every_instance() {
    let many = |first: u16| {
        let found = (first..first + 1500).map(|n| {
            let address = SocketAddr::from(([10, 0, (n >> 8) as u8, n as u8], 80));
            Found { id: address.to_string().into(), addresses: vec![address], is_partial: false, rank: (0, 0) }
        });
        answer(found)
    };
    let (mut one, mut other) = (Bench::new(), Bench::new());
    assert_eq!(one.learn(&many(0)).too_many, 500);
    other.learn(&answer(many(0).found.into_values().rev()));
    assert_eq!(one.members.count(), 1000);
    // What one of them knows, the other one knows.
    assert!(one.learn(&answer(many(0).found.into_values().take(1000))).events.is_empty());
    assert!(other.learn(&answer(many(0).found.into_values().take(1000))).events.is_empty());
    // Others take the places of those that leave, in the same answer.
    one.rules.gone_after = Duration::ZERO;
    let changes = one.learn(&many(5000));
    assert_eq!((changes.left, changes.joined, changes.too_many), (1000, 1000, 500));
}

#[test]
fn what_an_earlier_process_knew_stays_until_an_answer_misses_it() {
    let address = |n: u8| SocketAddr::from(([10, 0, 0, n], 80));
    let known = [1, 2].map(|n| (address(n).to_string().into(), address(n), Membership::weighing(1)));
    let (members, events) = Members::inherited(known);
    assert_eq!(events.len(), 4);
    let mut bench = Bench::with(members);
    assert_eq!(bench.members.count(), 2);
    assert!(bench.words(&failed(Outcome::ServerFailure)).is_empty());
    assert!(bench.words(&answer([1].map(backend))).is_empty());
    bench.now += GONE_AFTER;
    assert_eq!(bench.words(&answer([1].map(backend))), ["10.0.0.2:80 leaves within 5s"]);
}

/// The wait after an answer.
fn wait(schedule: &mut Schedule, members: &Members, answer: &Answer, chance: f64, now: Instant) -> Duration {
    schedule.answered(answer, members, &REFRESH, GONE_AFTER, chance, now);
    schedule.next - now
}

#[test]
fn the_ttl_decides_between_the_bounds() {
    let now = Instant::now();
    let (mut schedule, members) = (Schedule::new(now), Members::default());
    for (ttl, expected) in [(Some(0), 1), (Some(1), 1), (Some(10), 10), (Some(86_400), 30), (None, 1)] {
        let answer = Answer { ttl: ttl.map(seconds), ..answer([backend(1)]) };
        assert_eq!(wait(&mut schedule, &members, &answer, 0.0, now), seconds(expected), "{ttl:?}");
    }
    let answer = answer([backend(1)]);
    assert_eq!(wait(&mut schedule, &members, &answer, 1.0, now), seconds(9), "instances ask at different times");
}

#[test]
fn failures_are_repeated_ever_more_slowly() {
    let now = Instant::now();
    let (mut schedule, members) = (Schedule::new(now), Members::default());
    let waits: Vec<_> =
        (0..8).map(|_| wait(&mut schedule, &members, &failed(Outcome::Timeout), 0.5, now).as_secs()).collect();
    assert_eq!(waits, [1, 2, 4, 8, 16, 30, 30, 30]);
    assert_eq!(wait(&mut schedule, &members, &answer([backend(1)]), 0.0, now), seconds(10));
    assert_eq!(wait(&mut schedule, &members, &failed(Outcome::Timeout), 0.0, now), seconds(1));
}

#[test]
fn a_missing_backend_is_asked_for_when_it_is_due_to_leave() {
    let mut bench = Bench::new();
    let long = |found: &[u8]| Answer { ttl: Some(seconds(25)), ..answer(found.iter().copied().map(backend)) };
    bench.learn(&long(&[1, 2]));
    bench.learn(&long(&[1]));
    let mut schedule = Schedule::new(bench.now);
    bench.now += seconds(25);
    bench.learn(&long(&[1]));
    assert_eq!(wait(&mut schedule, &bench.members, &long(&[1]), 0.0, bench.now), seconds(5));
}

#[test]
fn a_failing_backend_hurries_the_next_question_and_less_each_time() {
    let now = Instant::now();
    let (mut schedule, members) = (Schedule::new(now), Members::default());
    let long = Answer { ttl: Some(seconds(600)), ..answer([backend(1)]) };
    let mut waits = Vec::new();
    for _ in 0..7 {
        schedule.answered(&long, &members, &REFRESH, GONE_AFTER, 0.0, now);
        schedule.hurry(true, &REFRESH, now);
        // News of other backends do not postpone it.
        schedule.hurry(true, &REFRESH, now + seconds(60));
        waits.push((schedule.next - now).as_secs());
        schedule.asks(true);
    }
    assert_eq!(waits, [1, 2, 4, 8, 16, 30, 30]);
    schedule.hurry(false, &REFRESH, now);
    schedule.hurry(true, &REFRESH, now);
    assert_eq!(schedule.next - now, seconds(1));
}

#[test]
fn a_wrong_name_has_a_remedy() {
    for (name, part) in [
        ("", "is empty"),
        (".", "is empty"),
        ("10.0.0.5", "use the provider static"),
        ("::1", "use the provider static"),
        ("web.example.com:80", "write \"web.example.com\" here"),
        ("http://web", "has a port"),
        ("web..example", "is not a DNS name"),
        ("web example", "is not a DNS name"),
        ("m\u{fc}nchen.example", "xn--"),
        (&"a".repeat(64), "is not a DNS name"),
        (&["a"; 130].join("."), "longer than 253"),
    ] {
        let problem = name_fault(name).unwrap_or_else(|| panic!("{name} is valid"));
        assert!(problem.contains(part), "{name}: {problem}");
    }
    for name in ["web", "web.example.com", "web.example.com.", "_redis._tcp.example.com.", "tasks.web.", "1.example"] {
        assert_eq!(name_fault(name), None, "{name}");
    }
}
