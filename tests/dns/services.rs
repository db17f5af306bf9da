//! SRV records: services with ports, weights and priorities.

use super::*;

#[tokio::test]
async fn srv_records_may_have_another_name() {
    let server = Server::echo_at("127.0.0.2:0").await;
    let port = server.address.port();
    let dns = NameServer::start(move |name, kind| match (name, kind) {
        ("_echo._tcp.test.", RecordType::SRV) => {
            Reply::Records(0, vec![cname("_echo._tcp.real.test."), srv(0, 0, port, "one.test.")])
        }
        ("one.test.", _) => only(RecordType::A, kind, 0, vec![a("127.0.0.2")]),
        _ => Reply::Records(0, Vec::new()),
    });
    let yaml = with(&format!("dns: {{ srv: _echo._tcp.test., {} }}", quick(&dns)));
    let ringway = Ringway::start(&yaml).await.all_healthy().await;
    assert_eq!(ids(&ringway), [format!("one.test:{port}")]);
}

#[tokio::test]
async fn srv_records_have_ports_weights_and_priorities() {
    let (one, two) = (Server::echo_at("127.0.0.2:0").await, Server::echo_at("127.0.0.3:0").await);
    let (first, second) = (one.address.port(), two.address.port());
    let script = move |weights: [u16; 2], address: &'static str| {
        move |name: &str, kind: RecordType| match (name, kind) {
            ("_echo._tcp.test.", RecordType::SRV) => Reply::Records(
                0,
                vec![
                    srv(1, weights[0], first, "One.test."),
                    srv(1, weights[1], second, "two.test."),
                    srv(2, 50, 9, "spare.test."),
                    srv(1, 50, 0, "no-port.test."),
                ],
            ),
            ("one.test.", _) => only(RecordType::A, kind, 0, vec![a(address)]),
            ("two.test.", _) => only(RecordType::A, kind, 0, vec![a("127.0.0.3")]),
            ("spare.test.", _) => only(RecordType::A, kind, 0, vec![a("127.0.0.9")]),
            other => panic!("asked for {other:?}"),
        }
    };
    let dns = NameServer::start(script([30, 10], "127.0.0.2"));
    let yaml = with(&format!("dns: {{ srv: _echo._tcp.test., {} }}", quick(&dns)));
    let ringway = Ringway::start(&yaml).await;
    let serve = || [0, 2].iter().all(|&n| ringway.states().get(n) == Some(&State::Healthy));
    eventually("both are healthy", serve).await;
    let targets = [format!("one.test:{first}"), format!("two.test:{second}")];
    assert_eq!(ids(&ringway), [&targets[0], "spare.test:9", &targets[1]]);
    let membership = |n| ringway.backend(n).membership;
    assert_eq!([0, 1, 2].map(|n| (membership(n).tier, membership(n).weight)), [(1, 16), (2, 16), (1, 5)]);
    // The heavier one has the points of a backend in another pool.
    let table = ringway.state().pools[0].table.load();
    let usual = Ringway::start(&with("static: [{ address: \"127.0.0.1:9\" }]")).await;
    let points = usual.state().pools[0].table.load().ring().points();
    assert_eq!(table.ring().points(), 2 * points + points * 5 / 16);

    // The server of the first target moves: its keys stay.
    let before = ringway.mapping();
    assert!(before.values().all(|owner| targets.contains(owner)), "a spare gets keys");
    drop(one);
    let _moved = Server::echo_at(&format!("127.0.0.4:{first}")).await;
    dns.now(script([30, 10], "127.0.0.4"));
    let moved = format!("127.0.0.4:{first}");
    eventually("another address", || ringway.backend(0).address.unwrap().to_string() == moved).await;
    eventually("healthy there", || [0, 2].map(|n| ringway.states()[n]) == [State::Healthy; 2]).await;
    assert_eq!(ringway.mapping(), before);

    // Another weight moves only keys of the backend that has it.
    dns.now(script([30, 20], "127.0.0.4"));
    eventually("another weight", || ringway.backend(2).membership.weight == 11).await;
    assert!(ringway.mapping().iter().all(|(key, owner)| *owner == before[key] || *owner == targets[1]));
    assert_eq!(ringway.metric("ringway_provider_changes_total", &["kind=\"changed\""]).await, 2.0);
}

#[tokio::test]
async fn a_target_whose_look_up_fails_keeps_its_address() {
    let server = Server::echo_at("127.0.0.2:0").await;
    let port = server.address.port();
    let script = move |reply: Reply| {
        move |name: &str, kind: RecordType| match kind {
            RecordType::SRV => Reply::Records(0, vec![srv(0, 0, port, "one.test.")]),
            _ if name == "one.test." && kind == RecordType::A => reply.clone(),
            _ => Reply::Records(0, Vec::new()),
        }
    };
    let dns = NameServer::start(script(Reply::Records(0, vec![a("127.0.0.2")])));
    let yaml = with(&format!("dns: {{ srv: _echo._tcp.test., {} }}", quick(&dns)));
    let ringway = Ringway::start(&yaml).await.all_healthy().await;
    dns.now(script(Reply::Code(ResponseCode::ServFail)));
    three_more(&ringway, "partial").await;
    assert_eq!(ids(&ringway), [format!("one.test:{port}")]);
    // A target without an address is not there.
    dns.now(script(Reply::Code(ResponseCode::NXDomain)));
    become_ids(&ringway, &[]).await;
}
