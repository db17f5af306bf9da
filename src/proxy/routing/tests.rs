use proptest::prelude::*;

use super::*;
use crate::client_hello::{Parsed, parse};
use crate::networks::Network;

fn condition(sni: &[&str], alpn: &[&str], from: &[&str], tls: Option<bool>) -> Condition {
    Condition {
        sni: sni.iter().map(|name| name.parse().unwrap()).collect(),
        alpn: alpn.iter().map(|name| (*name).to_owned()).collect(),
        from: (!from.is_empty()).then(|| from.iter().map(|net| net.parse::<Network>().unwrap()).collect()),
        tls,
    }
}

/// Rules with these conditions, and a last one without.
fn routing(conditions: &[Condition]) -> Routing {
    let last = Condition::default();
    let rules = conditions.iter().chain([&last]).enumerate().map(|(n, when)| Rule {
        name: n.to_string().into(),
        when: when.clone(),
        route: None,
        matched: Arc::default(),
    });
    Routing {
        keeps_port: false,
        allow: None,
        deny: None,
        rules: rules.collect(),
        routes: Box::default(),
        hello: HelloSettings { timeout: Duration::from_secs(1), most: 1 << 16, undecided_takes_default: false },
        hello_bytes: Histogram::noop(),
    }
}

fn client(ip: &str) -> Client {
    Client::Ip((ip.parse::<std::net::IpAddr>().unwrap(), 1).into())
}

/// A ClientHello with this name and these protocols.
fn hello(name: Option<&str>, protocols: &[&str]) -> Hello {
    match parse(&loadtest::client_hello(name.unwrap_or_default(), protocols), 1 << 16) {
        Parsed::Hello(hello) => hello,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_first_rule_that_matches_decides() {
    let routing = routing(&[
        condition(&["db.example.com"], &[], &[], None),
        condition(&["*.example.com"], &["h2"], &[], None),
        condition(&[], &["h2", "acme-tls/1"], &["10.0.0.0/8"], None),
        condition(&[], &[], &["10.0.0.0/8"], None),
        condition(&[], &[], &[], Some(false)),
        condition(&[], &[], &[], Some(true)),
    ]);
    let decide = |ip, hello: &Hello| routing.decide(client(ip), Some(Begin::Tls(hello))).unwrap();
    assert_eq!(decide("192.0.2.1", &hello(Some("DB.example.com."), &[])), 0);
    assert_eq!(decide("192.0.2.1", &hello(Some("a.example.com"), &["http/1.1", "h2"])), 1);
    assert_eq!(decide("192.0.2.1", &hello(Some("a.example.com"), &["http/1.1"])), 5);
    assert_eq!(decide("192.0.2.1", &hello(Some("a.b.example.com"), &["h2"])), 5, "`*` is one label");
    assert_eq!(decide("192.0.2.1", &hello(Some("example.com"), &["h2"])), 5);
    assert_eq!(decide("10.0.0.1", &hello(None, &["acme-tls/1"])), 2);
    assert_eq!(decide("10.0.0.1", &hello(None, &[])), 3);
    assert_eq!(routing.decide(client("10.0.0.1"), Some(Begin::Plain)), Some(3));
    assert_eq!(routing.decide(client("192.0.2.1"), Some(Begin::Plain)), Some(4));
    assert_eq!(routing.decide_for_silent(client("192.0.2.1")), Some(4));
}

#[test]
fn a_rule_is_decided_without_bytes_only_if_no_rule_before_it_needs_them() {
    let by_client = condition(&[], &[], &["10.0.0.0/8"], None);
    let by_name = condition(&["a.example"], &[], &["10.0.0.0/8", "192.0.2.0/24"], None);
    let first = routing(&[by_client.clone(), by_name.clone()]);
    assert_eq!(first.decide(client("10.0.0.1"), None), Some(0));
    assert_eq!(first.decide(client("192.0.2.1"), None), None);
    // No bytes of this client can match the rule with a name.
    assert_eq!(first.decide(client("198.51.100.1"), None), Some(2));
    let last = routing(&[by_name, by_client]);
    assert_eq!(last.decide(client("10.0.0.1"), None), None);
    // A client that sends nothing may belong to the first rule. So no rule takes it, not even the one for its address.
    assert_eq!(last.decide_for_silent(client("10.0.0.1")), None);
}

#[test]
fn a_silent_client_is_one_without_tls_if_the_rules_expect_such_clients() {
    let sni = condition(&["a.example"], &[], &[], None);
    let near = condition(&[], &[], &["10.0.0.0/8"], None);
    let plain = condition(&[], &[], &[], Some(false));
    let plain_far = condition(&[], &[], &["192.0.2.0/24"], Some(false));
    let with_plain = routing(&[sni.clone(), near.clone(), plain]);
    // A rule before the one for clients without TLS still counts.
    assert_eq!(with_plain.decide_for_silent(client("10.0.0.1")), Some(1));
    assert_eq!(with_plain.decide_for_silent(client("11.0.0.1")), Some(2));
    let with_far = routing(&[sni, plain_far, near]);
    assert_eq!(with_far.decide_for_silent(client("192.0.2.1")), Some(1));
    assert_eq!(with_far.decide_for_silent(client("10.0.0.1")), None);
    assert_eq!(with_far.decide_for_silent(client("11.0.0.1")), None, "the default is not for silent clients");
    // If the config lets undecided connections in, they still do not get past a rule for their address.
    assert_eq!(with_far.decide_undecided(client("10.0.0.1")), 2);
    assert_eq!(with_far.decide_undecided(client("11.0.0.1")), 3);
}

#[test]
fn a_list_of_denied_clients_counts_more_than_one_of_allowed_clients() {
    let networks = |list: &[&str]| Some(Arc::new(list.iter().map(|net| net.parse::<Network>().unwrap()).collect()));
    let mut routing = routing(&[]);
    assert_eq!(routing.keeps_out(client("10.0.0.1")), None);
    routing.allow = networks(&["10.0.0.0/8"]);
    routing.deny = networks(&["10.1.0.0/16"]);
    assert_eq!(routing.keeps_out(client("10.0.0.1")), None);
    assert_eq!(routing.keeps_out(client("10.1.0.1")), Some(RefusalReason::Denied));
    assert_eq!(routing.keeps_out(client("11.0.0.1")), Some(RefusalReason::NotAllowed));
}

#[test]
fn patterns_are_names_or_one_label_before_a_name() {
    for (text, shown) in [("WWW.Example.com.", "www.example.com"), ("*.Example.com", "*.example.com")] {
        assert_eq!(text.parse::<NamePattern>().unwrap().to_string(), shown);
    }
    for text in ["*", "*.", "a.*.example", "*a.example", "", "192.0.2.1", "a b", "https://a.example", "a:443"] {
        assert!(text.parse::<NamePattern>().unwrap_err().contains("server name"), "{text}");
    }
}

/// Conditions of few values, so that some cover others.
fn conditions() -> impl Strategy<Value = Condition> {
    let some = |all: &'static [&'static str]| proptest::sample::subsequence(all, 0..=all.len());
    let sni = some(&["a.x", "b.x", "*.x", "c"]);
    let from = some(&["10.0.0.0/8", "10.1.0.0/16", "unix"]);
    let tls = proptest::option::of(any::<bool>());
    (sni, some(&["h2", "p"]), from, tls).prop_map(|(sni, alpn, from, tls)| condition(&sni, &alpn, &from, tls))
}

proptest! {
    #[test]
    fn a_rule_that_another_one_covers_never_matches_alone(wide in conditions(), narrow in conditions()) {
        let names = [None, Some("a.x"), Some("b.x"), Some("d.x"), Some("c"), Some("a.b.x")];
        let protocols: [&[&str]; 4] = [&[], &["h2"], &["p"], &["p", "h2"]];
        let hellos: Vec<_> = names.iter().flat_map(|&name| protocols.map(|list| hello(name, list))).collect();
        let clients = [client("10.0.0.1"), client("10.1.0.1"), client("11.0.0.1"), Client::Unix { user: 0, pid: 0, number: 0 }];
        let begins: Vec<_> = hellos.iter().map(Begin::Tls).chain([Begin::Plain]).collect();
        let alone = |client| begins.iter().any(|&begin| {
            narrow.holds(client, Some(begin)) == Some(true) && wide.holds(client, Some(begin)) == Some(false)
        });
        if wide.covers(&narrow) {
            prop_assert!(!clients.into_iter().any(alone));
        }
        // What is decided without bytes does not change with them.
        for client in clients {
            if let Some(early) = wide.holds(client, None) {
                prop_assert!(begins.iter().all(|&begin| wide.holds(client, Some(begin)) == Some(early)));
            }
        }
    }
}
