//! Ringway as process 1, as in a container: it handles signals and reaps orphans.

use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::harness::program::{Killed, file};
use crate::harness::{THREE_REPLICAS, config, eventually};

/// The processes with this parent: the id, whether it is a zombie, and its name.
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

/// The test needs root for a separate process namespace.
#[tokio::test]
#[ignore = "needs root"]
async fn process_1_handles_signals_and_reaps_orphans() {
    // Every replica leaves orphans that exit soon.
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
    // The orphans exit in this time. Without process 1 as their reaper they would stay as zombies.
    tokio::time::sleep(Duration::from_millis(500)).await;
    eventually("no zombies", || children(init).iter().all(|child| !child.1)).await;
    assert_eq!(children(init).len(), 1, "{:?}", children(init));

    // After an upgrade, process 1 waits for the new process and reaps the orphans of the old one.
    kill_process(Pid::from_raw(init).unwrap(), Signal::USR2).unwrap();
    eventually("another main process", || {
        // The children are the new process and the three shims of the replicas, which have lost their parent.
        let all = children(init);
        all.len() == 4 && !all.iter().any(|child| child.0 == main)
    })
    .await;
    assert!(unshare.0.try_wait().unwrap().is_none(), "the container ended with the first process");
    eventually("no zombies", || children(init).iter().all(|child| !child.1)).await;

    kill_process(Pid::from_raw(init).unwrap(), Signal::TERM).unwrap();
    let mut status = None;
    eventually("the end of process 1", || {
        status = unshare.0.try_wait().unwrap();
        status.is_some()
    })
    .await;
    assert_eq!(status.unwrap().code(), Some(0), "the exit code of the shutdown");
}
