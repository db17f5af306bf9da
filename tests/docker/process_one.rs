//! Ringway as process 1, as in a container: signals work, and there are no zombies.

use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::harness::program::{Killed, file};
use crate::harness::{THREE_REPLICAS, config, eventually};

/// Processes with this parent: id, whether it is a zombie, and what it runs.
fn children(parent: i32) -> Vec<(i32, bool, String)> {
    let pids = std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let child = |pid: i32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (name, rest) = stat.split_once(' ')?.1.rsplit_once(") ")?;
        let mut fields = rest.split(' ');
        let is_zombie = fields.next()? == "Z";
        (fields.next()?.parse() == Ok(parent)).then(|| (pid, is_zombie, name.trim_start_matches('(').to_owned()))
    };
    pids.filter_map(child).collect()
}

/// In a process namespace of its own, which takes root as a container does.
#[tokio::test]
#[ignore = "needs root"]
async fn as_process_1_it_obeys_signals_and_buries_orphans() {
    // Every replica leaves an orphan that ends soon.
    let echo = "exec $0 echo-server --listen 127.0.0.1:{port} --name {slot}";
    let orphans =
        format!("command: [sh, -c, \"(sleep 0.2 & sleep 0.1 &) ; {echo}\", \"{}\"]", env!("CARGO_BIN_EXE_ringway"));
    let start = THREE_REPLICAS.find("command:").unwrap();
    let provider = format!("{}{orphans} }}", &THREE_REPLICAS[..start]);
    let yaml = file(&config(&provider, "", ""));
    let unshare = Command::new("unshare")
        .args(["--pid", "--fork", "--mount-proc", "--kill-child", env!("CARGO_BIN_EXE_ringway"), "--config"])
        .arg(yaml.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let mut unshare = Killed(unshare.unwrap());
    let outer = i32::try_from(unshare.0.id()).unwrap();
    let mut init = None;
    eventually("process 1", || {
        init = children(outer).first().map(|child| child.0);
        init.is_some_and(|init| children(init).iter().any(|child| child.2.starts_with("ringway")))
    })
    .await;
    let init = init.unwrap();
    let main = children(init)[0].0;
    eventually("three replicas", || children(main).len() == 3).await;
    // The orphans have ended by then, and come to process 1 when they do.
    tokio::time::sleep(Duration::from_millis(500)).await;
    eventually("no zombies", || children(init).iter().all(|child| !child.1)).await;
    assert_eq!(children(init).len(), 1, "{:?}", children(init));

    // An upgrade: process 1 follows it, and buries what it leaves behind.
    kill_process(Pid::from_raw(init).unwrap(), Signal::USR2).unwrap();
    eventually("another main process", || {
        // The successor, and beside it the shims of its replicas, which have nobody else any more.
        let all = children(init);
        all.len() == 4 && !all.iter().any(|child| child.0 == main)
    })
    .await;
    assert!(unshare.0.try_wait().unwrap().is_none(), "the container ended with the first process");
    eventually("no zombies", || children(init).iter().all(|child| !child.1)).await;

    kill_process(Pid::from_raw(init).unwrap(), Signal::TERM).unwrap();
    let mut status = None;
    eventually("its end", || {
        status = unshare.0.try_wait().unwrap();
        status.is_some()
    })
    .await;
    assert_eq!(status.unwrap().code(), Some(0), "in order");
}
