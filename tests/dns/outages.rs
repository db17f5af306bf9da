//! Answers that are wrong, incomplete or missing.

use super::*;

#[tokio::test]
async fn no_outage_of_the_name_server_removes_a_backend() {
    let (port, _servers) = echo_at(&["127.0.0.2", "127.0.0.3"]).await;
    let both = ["127.0.0.2", "127.0.0.3"];
    let dns = NameServer::start(hosts(0, &both));
    let ringway = Ringway::start(&addresses(&dns, port)).await.all_healthy().await;
    let outages = [
        (Reply::Code(ResponseCode::ServFail), "server_failure"),
        (Reply::Code(ResponseCode::Refused), "refused"),
        (Reply::CutOff, "truncated"),
        (Reply::Garbage, "timeout"),
        (Reply::Referral, "failed"),
        (Reply::WrongId, "timeout"),
        (Reply::Silent, "timeout"),
    ];
    for (reply, result) in outages {
        dns.now(move |_, _| reply.clone());
        // `gone_after` is half a second, and the waits are 1 s long.
        three_more(&ringway, result).await;
        assert_eq!(ids(&ringway), at(&both, port), "{result}");
        let status = get(ringway.api(), "/api/status").await.1;
        let status: serde_json::Value = serde_json::from_str(&status).unwrap();
        let provider = &status["pools"][0]["provider"];
        assert!(provider["dns"]["error"].as_str().unwrap().contains("web.test. A"), "{provider}");
        assert_eq!(provider["dns"]["backends"], 2);
        dns.now(hosts(0, &both));
        three_more(&ringway, "found").await;
    }
    assert_eq!(ringway.metric("ringway_provider_changes_total", &["kind=\"left\""]).await, 0.0);
}

#[tokio::test]
async fn one_family_may_be_empty_but_may_not_fail() {
    let (port, _servers) = echo_at(&["127.0.0.2", "127.0.0.3"]).await;
    let of_both = |v6: Reply, v4: &'static [&'static str]| {
        let mut v4 = hosts(0, v4);
        move |name: &str, kind| if kind == RecordType::AAAA { v6.clone() } else { v4(name, kind) }
    };
    // Some servers say for AAAA that the whole name does not exist.
    let dns = NameServer::start(of_both(Reply::Code(ResponseCode::NXDomain), &["127.0.0.2", "127.0.0.3"]));
    let ringway = Ringway::start(&addresses(&dns, port)).await.all_healthy().await;
    assert_eq!(ids(&ringway).len(), 2);
    // The failure of one family is not an answer of the other.
    dns.now(of_both(Reply::Code(ResponseCode::ServFail), &["127.0.0.2"]));
    three_more(&ringway, "server_failure").await;
    assert_eq!(ids(&ringway).len(), 2);
    dns.now(of_both(Reply::Records(0, vec![aaaa("::1"), aaaa("::ffff:127.0.0.2")]), &["127.0.0.2"]));
    become_ids(&ringway, &[format!("127.0.0.2:{port}"), format!("[::1]:{port}")]).await;
}

#[tokio::test]
async fn a_name_that_does_not_exist_for_a_moment_keeps_its_backends() {
    let (port, _servers) = echo_at(&["127.0.0.2"]).await;
    let dns = NameServer::start(hosts(0, &["127.0.0.2"]));
    let yaml = addresses(&dns, port).replace("gone_after: 500ms", "gone_after: 1h");
    let ringway = Ringway::start(&yaml).await.all_healthy().await;
    for reply in [Reply::Code(ResponseCode::NXDomain), Reply::Records(0, Vec::new())] {
        dns.now(move |_, _| reply.clone());
        three_more(&ringway, "empty").await;
        assert_eq!(ids(&ringway).len(), 1);
    }
    // The time can be changed while the answers miss the backend.
    ringway.reload(&addresses(&dns, port)).await.unwrap();
    become_ids(&ringway, &[]).await;
    dns.now(hosts(0, &["127.0.0.2"]));
    become_ids(&ringway, &at(&["127.0.0.2"], port)).await;
    assert!(soon("an echo", echoes(&mut TcpStream::connect(ringway.web()).await.unwrap())).await);
}
