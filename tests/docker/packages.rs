//! The Debian package in a clean Debian with systemd: installation, upgrade under load, rotation, watchdog, purge.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tempfile::TempDir;
use tokio::net::TcpStream;

use crate::harness::engine::Owner;
use crate::harness::{echoes, eventually_async};

/// Programs that the test needs, and where they come from.
const NEEDED: [(&str, &str); 3] = [
    ("debootstrap", "Debian: debootstrap"),
    ("cargo-deb", "cargo install --locked cargo-deb"),
    ("cargo-cyclonedx", "cargo install --locked cargo-cyclonedx"),
];

/// Replicas that the service starts itself, and a log where the package rotates logs.
const CONFIG: &str = "\
access_log: { path: /var/log/ringway/access.log }
listeners: [{ name: web, listen: \"0.0.0.0:8000\", pool: echo }]
pools:
  - name: echo
    drain: 5s
    provider:
      process: { replicas: 2, command: [ringway, echo-server, --listen, \"127.0.0.1:{port}\", --name, \"{slot}\"] }
";

/// Runs a program to its end.
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{command:?}: {said}");
    said
}

/// A container that runs systemd. It is removed when it is dropped, with its image.
struct Machine {
    name: String,
    owner: Owner,
}

impl Machine {
    /// Makes an image of a minimal Debian, and starts it with this folder at `/packages`.
    async fn boot(owner: Owner, packages: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        let options = ["--variant=minbase", "--include=systemd,systemd-sysv,dbus,logrotate", "bookworm"];
        run(Command::new("debootstrap").args(options).arg(&root));
        let name = format!("{}-debian", owner.name);
        let import = "tar --directory \"$0\" --exclude=./var/cache/apt/archives --create . | docker import - \"$1\"";
        run(Command::new("sh").args(["-c", import]).arg(&root).arg(&name));
        let machine = Self { name, owner };
        let packages = format!("{}:/packages:ro", packages.display());
        let own = ["run", "--detach", "--name", &machine.name, "--volume", &packages];
        let systemd = [
            "--cap-add=SYS_ADMIN",
            "--security-opt=seccomp=unconfined",
            "--security-opt=apparmor=unconfined",
            "--cgroupns=host",
            "--volume=/sys/fs/cgroup:/sys/fs/cgroup:rw",
            "--tmpfs=/run",
            "--tmpfs=/tmp",
            "--env=container=docker",
            &machine.name,
            "/sbin/init",
        ];
        machine.owner.docker(&[&own[..], &systemd[..]].concat());
        eventually_async("systemd", async || machine.try_sh("systemctl is-system-running").1 == "running").await;
        machine
    }

    fn sh(&self, script: &str) -> String {
        let (done, said) = self.try_sh(script);
        assert!(done, "{script}: {said}");
        said
    }

    fn try_sh(&self, script: &str) -> (bool, String) {
        self.owner.try_docker(&["exec", &self.name, "sh", "-c", script])
    }

    fn address(&self) -> String {
        let ip = self.owner.docker(&["inspect", "--format", "{{.NetworkSettings.IPAddress}}", &self.name]);
        format!("{ip}:8000")
    }

    /// The process of the service; 0: none.
    fn main_process(&self) -> String {
        self.sh("systemctl show --property=MainPID --value ringway")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.owner.try_docker(&["rm", "-f", "-v", &self.name]);
        self.owner.try_docker(&["rmi", &self.name]);
    }
}

/// Builds the packages, and a copy of the Debian package with a higher revision.
fn build(folder: &TempDir) -> [PathBuf; 2] {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    run(&mut Command::new(root.join("packaging/build.sh")));
    let dist = root.join("target/package/dist");
    run(Command::new("sha256sum").args(["--check", "--strict", "SHA256SUMS"]).current_dir(&dist));
    let version = env!("CARGO_PKG_VERSION");
    let [first, second] = [1, 2].map(|revision| folder.path().join(format!("ringway_{version}-{revision}.deb")));
    std::fs::copy(dist.join(format!("ringway_{version}-1_amd64.deb")), &first).unwrap();
    let raised =
        "dpkg-deb -R \"$0\" \"$1\" && sed -i 's/^Version: .*/&0/' \"$1/DEBIAN/control\" && dpkg-deb -b \"$1\" \"$2\"";
    run(Command::new("sh").args(["-c", raised]).arg(&first).arg(folder.path().join("raised")).arg(&second));

    // The archive runs where it is unpacked, and the bill of materials has the crates of the binary.
    let archive = std::fs::read_dir(&dist).unwrap().map(|entry| entry.unwrap().path());
    let archive = archive.into_iter().find(|path| path.to_string_lossy().ends_with(".tar.gz")).unwrap();
    run(Command::new("tar").arg("-xzf").arg(&archive).args(["--strip-components=1", "-C"]).arg(folder.path()));
    let said = run(Command::new("./ringway").args(["check", "--offline"]).current_dir(folder.path()));
    assert_eq!(said, "config.yaml: valid\n");
    let bill = std::fs::read_to_string(dist.join(format!("ringway-{version}.cdx.json"))).unwrap();
    let bill: serde_json::Value = serde_json::from_str(&bill).unwrap();
    let names: Vec<_> =
        bill["components"].as_array().unwrap().iter().map(|part| part["name"].as_str().unwrap()).collect();
    assert_eq!(bill["metadata"]["component"]["name"], "ringway");
    assert!(names.contains(&"seahash") && names.contains(&"tokio") && !names.contains(&"proptest"), "{names:?}");
    [first, second]
}

/// Clients that connect, get an echo and leave, one after the other.
struct Load {
    is_over: Arc<AtomicBool>,
    served: Arc<AtomicUsize>,
    clients: Vec<tokio::task::JoinHandle<Vec<String>>>,
}

impl Load {
    fn start(address: &str) -> Self {
        let (is_over, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let client = |_| {
            let (address, is_over, served) = (address.to_owned(), Arc::clone(&is_over), Arc::clone(&served));
            tokio::spawn(async move {
                let mut failures = Vec::new();
                while !is_over.load(Ordering::Relaxed) {
                    match TcpStream::connect(&address).await {
                        Err(error) => failures.push(error.to_string()),
                        Ok(mut stream) => {
                            if echoes(&mut stream).await {
                                served.fetch_add(1, Ordering::Relaxed);
                            } else {
                                failures.push("no echo".to_owned());
                            }
                        }
                    }
                }
                failures
            })
        };
        let clients = (0..4).map(client).collect();
        Self { is_over, served, clients }
    }

    async fn more(&self, count: usize) {
        let before = self.served.load(Ordering::Relaxed);
        eventually_async("served clients", async || self.served.load(Ordering::Relaxed) >= before + count).await;
    }

    async fn end(self) -> Vec<String> {
        self.is_over.store(true, Ordering::Relaxed);
        let mut failures = Vec::new();
        for client in self.clients {
            failures.extend(client.await.unwrap());
        }
        failures
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Docker engine, root and a Debian mirror"]
async fn a_package_installs_upgrades_under_load_and_leaves_nothing_behind() {
    for (program, source) in NEEDED {
        let is_there = Command::new("which").arg(program).output().is_ok_and(|output| output.status.success());
        if !is_there {
            assert!(std::env::var_os("CI").is_none(), "the gate installs {program}");
            println!("{program} is not installed ({source}): nothing checked");
            return;
        }
    }
    let owner = Owner::new().await;
    let folder = tempfile::tempdir().unwrap();
    let packages = tokio::task::block_in_place(|| build(&folder));
    let [first, second] =
        packages.each_ref().map(|path| format!("dpkg -i /packages/{}", path.file_name().unwrap().display()));
    let machine = Machine::boot(owner, folder.path()).await;

    // A first installation starts nothing, and has a config to start from.
    let said = machine.sh(&first);
    assert!(said.contains("edit /etc/ringway/config.yaml, then: systemctl enable --now ringway"), "{said}");
    assert_eq!(machine.try_sh("systemctl is-active ringway").1, "inactive");
    assert_eq!(machine.try_sh("systemctl is-enabled ringway").1, "disabled");
    assert_eq!(machine.sh("ringway check --offline"), "/etc/ringway/config.yaml: valid");
    assert_eq!(machine.sh("head -n 1 /etc/ringway/config.yaml | cut -d= -f2 | xargs head -c 1"), "{");
    for path in ["/usr/share/man/man1/ringway-drain.1.gz", "/usr/share/bash-completion/completions/ringway"] {
        machine.sh(&format!("test -s {path}"));
    }
    machine.sh("systemd-analyze verify /usr/lib/systemd/system/ringway.service && getent passwd ringway");

    // The service runs with the config of the operator, as its own user.
    machine.sh(&format!("cat > /etc/ringway/config.yaml <<'END'\n{CONFIG}END"));
    machine.sh("systemctl enable --now ringway");
    assert_eq!(machine.sh("stat --format %U /proc/$(systemctl show --property=MainPID --value ringway)"), "ringway");
    let address = machine.address();
    let connect = async || TcpStream::connect(&address).await.unwrap();
    eventually_async("an echo", async || echoes(&mut connect().await).await).await;

    // An upgrade hands over. What is open goes on, and no client notices.
    let (old, load) = (machine.main_process(), Load::start(&address));
    let mut open = Vec::new();
    for _ in 0..20 {
        open.push(connect().await);
        assert!(echoes(open.last_mut().unwrap()).await);
    }
    load.more(200).await;
    let said = tokio::task::block_in_place(|| machine.sh(&second));
    let new = machine.main_process();
    assert!(said.contains(&format!("process {new} has taken over")), "{said}");
    assert_ne!(new, old);
    for stream in &mut open {
        assert!(echoes(stream).await, "a connection ended with the upgrade of the package");
    }
    load.more(200).await;
    assert!(machine.sh("ringway status").contains("ready"));

    // A config that does not pass keeps the old program. The installation succeeds.
    machine.sh("sed -i s/replicas:/replicsa:/ /etc/ringway/config.yaml");
    let said = tokio::task::block_in_place(|| machine.sh(&second));
    assert!(
        said.contains("did you mean \"replicas\"?") && said.contains("keeps running with the old program"),
        "{said}"
    );
    assert_eq!(machine.main_process(), new);
    machine.sh("sed -i s/replicsa:/replicas:/ /etc/ringway/config.yaml");
    load.more(200).await;
    let failures = load.end().await;
    assert!(failures.is_empty(), "{} failures: {:?}", failures.len(), &failures[..failures.len().min(5)]);

    // A rotation: the service goes on in a new file.
    machine.sh("logrotate --force /etc/logrotate.d/ringway && test -s /var/log/ringway/access.log.1");
    eventually_async("a line in the new log", async || {
        assert!(echoes(&mut connect().await).await);
        machine.try_sh("test -s /var/log/ringway/access.log").0
    })
    .await;

    // A process that hangs is replaced.
    machine.sh("mkdir -p /etc/systemd/system/ringway.service.d && systemctl show --property=WatchdogUSec ringway | grep -q 30s");
    machine.sh("printf '[Service]\\nWatchdogSec=1s\\n' > /etc/systemd/system/ringway.service.d/test.conf");
    machine.sh("systemctl daemon-reload && systemctl restart ringway");
    let hangs = machine.main_process();
    machine.sh(&format!("kill -STOP {hangs}"));
    eventually_async("another process", async || ![&hangs, "0"].contains(&&*machine.main_process())).await;
    assert!(machine.sh("journalctl --unit ringway").contains("Watchdog timeout"), "the journal does not say why");
    eventually_async("an echo", async || match TcpStream::connect(&address).await {
        Ok(mut stream) => echoes(&mut stream).await,
        Err(_) => false,
    })
    .await;

    // A removal keeps the config, a purge nothing but the user.
    machine.sh("rm -r /etc/systemd/system/ringway.service.d && dpkg --remove ringway");
    assert_eq!(machine.try_sh("systemctl is-active ringway").1, "inactive");
    machine.sh("test -e /etc/ringway/config.yaml && ! test -e /usr/bin/ringway && ! pgrep ringway");
    machine.sh("dpkg --purge ringway");
    let left =
        machine.sh("find / -xdev -name '*ringway*' -not -path '/proc/*' -not -path '/packages/*' -not -path '/sys/*'");
    assert_eq!(left, "", "the purge left files behind");
}
