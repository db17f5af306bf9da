//! Access lists: who may connect.

use std::io::Write as _;

use ringway::control::command::Command;
use ringway::control::provider::Listed;

use super::*;
use crate::harness::program::file;

fn access(list: &str, server: &Server) -> String {
    routed(&format!("{list}    pool: a\n"), &["a"], std::slice::from_ref(server), PLAIN_POOL)
}

async fn may_connect(ringway: &Ringway) -> bool {
    // The reset can come before the client knows that it is connected.
    let Ok(mut stream) = TcpStream::connect(ringway.web()).await else { return false };
    soon("an answer or a reset", stream.read_exact(&mut [0])).await.is_ok()
}

#[tokio::test]
async fn lists_keep_clients_out() {
    let server = named(b'a').await;
    let log = tempfile::NamedTempFile::new().unwrap();
    let logged = |yaml: &str| format!("access_log: {{ path: {:?} }}\n{yaml}", log.path());
    let ringway = Ringway::start(&logged(&access("", &server))).await;
    for (list, wanted) in [
        ("    allow: [127.0.0.0/8]\n", None),
        ("    deny: [10.0.0.0/8]\n", None),
        ("    allow: [10.0.0.0/8, unix]\n", Some(RefusalReason::NotAllowed)),
        ("    deny: [127.0.0.1]\n", Some(RefusalReason::Denied)),
        ("    allow: [127.0.0.0/8]\n    deny: [127.0.0.1]\n", Some(RefusalReason::Denied)),
    ] {
        ringway.reload(&logged(&access(list, &server))).await.unwrap();
        let before = wanted.map(|reason| stats(&ringway).refused(reason));
        assert_eq!(may_connect(&ringway).await, wanted.is_none(), "{list}");
        if let (Some(reason), Some(before)) = (wanted, before) {
            eventually("counted", || stats(&ringway).refused(reason) == before + 1).await;
        }
    }
    drop(ringway);
    // Clients that a list refuses must not fill the log.
    assert_eq!(std::fs::read_to_string(log.path()).unwrap().lines().count(), 2);
}

#[tokio::test]
async fn a_list_in_a_file_is_read_with_the_config_and_a_wrong_line_changes_nothing() {
    let server = named(b'a').await;
    let mut denied = file("# nobody yet\n");
    let yaml = access(&format!("    deny: {{ file: {} }}\n", denied.path().display()), &server);
    let ringway = Ringway::start(&yaml).await;
    assert!(may_connect(&ringway).await);
    writeln!(denied, "127.0.0.1 # this host\n127.0.0.1/33").unwrap();
    let error = ringway.reload(&yaml).await.unwrap_err().to_string();
    assert!(
        error.contains(&format!("listeners[web].deny.file: {}:3: not a network", denied.path().display())),
        "{error}"
    );
    assert!(may_connect(&ringway).await, "a wrong list took effect");
    std::fs::write(denied.path(), "127.0.0.1\n").unwrap();
    assert!(may_connect(&ringway).await, "without a reload");
    let report = ringway.reload(&yaml).await.unwrap();
    assert!(report.changes[0].starts_with("listeners[web].deny.contents: 0 networks, digest "), "{report:?}");
    assert!(!may_connect(&ringway).await);
    // A list that cannot be read is no empty list.
    std::fs::remove_file(denied.path()).unwrap();
    ringway.reload(&yaml).await.unwrap_err();
    assert!(!may_connect(&ringway).await);
    // A change at run time does not read it again.
    let backend = Listed::parse("127.0.0.1:1", None, ringway::backend::Membership::weighing(1)).unwrap();
    let add = Command::Add { pool: "a".to_owned(), backend };
    ringway.send(add).await.unwrap();
    assert_eq!(ringway.state().pools[0].table.load().backends().len(), 2);
    assert!(!may_connect(&ringway).await);
    std::fs::write(denied.path(), "").unwrap();
}
