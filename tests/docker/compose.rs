//! `compose.yaml` as an operator uses it. The tests use other ports and separate projects.

use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use crate::harness::engine::{IMAGE, Owner};
use crate::harness::{eventually, eventually_async, get, http};

/// A separate project. It is taken down when it is dropped.
struct Project {
    name: String,
    folder: TempDir,
    /// Removes the containers that `down` leaves.
    owner: Owner,
}

/// Builds the image of a project. Returns its id.
fn build(owner: &Owner, folder: &Path, project: &str, version: u32) -> String {
    let image = format!("ringway-test:{project}");
    let dockerfile = format!(
        "FROM {IMAGE}\nLABEL com.docker.compose.project={project} com.docker.compose.service=ringway com.docker.compose.version=2.40.3 \
         rwtest.version={version}\n"
    );
    std::fs::write(folder.join("Dockerfile"), dockerfile).unwrap();
    owner.docker(&["build", "-q", "-t", &image, &folder.display().to_string()]);
    owner.docker(&["inspect", "-f", "{{.Id}}", &image])
}

impl Project {
    /// Creates a project with an image like that of compose v2, which has labels of the project.
    async fn new() -> Self {
        let mut owner = Owner::new().await;
        // The owner of the containers has the name of the project.
        let name = owner.name.replace('-', "x");
        owner.name.clone_from(&name);
        Self::of(name, owner)
    }

    /// Creates a second project.
    fn beside(other: &Self) -> Self {
        let name = format!("{}b", other.name);
        Self::of(name.clone(), other.owner.beside(&name))
    }

    fn of(name: String, owner: Owner) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = format!("ringway-test:{name}");
        build(&owner, folder.path(), &name, 1);
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let read = |file: &str| std::fs::read_to_string(root.join(file)).unwrap();
        let config = folder.path().join("ringway.yaml");
        std::fs::write(&config, read("docker/ringway.yaml").replace(IMAGE, &image)).unwrap();
        let yaml = read("compose.yaml")
            .replace(IMAGE, &image)
            .replace("./docker/ringway.yaml", &config.display().to_string())
            .replace("\"8000:8000\"", "\"127.0.0.1::8000\"")
            .replace("\"127.0.0.1:8001:8001\"", "\"127.0.0.1::8001\"");
        std::fs::write(folder.path().join("compose.yaml"), yaml).unwrap();
        Self { name, folder, owner }
    }

    /// Creates a project of the compose file in this folder of the examples.
    async fn of_example(folder: &str) -> Self {
        let owner = Owner::new().await;
        let (name, root) =
            (owner.name.replace('-', "x"), Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(folder));
        let read = |file: &str| std::fs::read_to_string(root.join(file)).unwrap();
        let files = tempfile::tempdir().unwrap();
        let yaml =
            read("compose.yaml").replace("./ringway.yaml", &root.join("ringway.yaml").display().to_string()).replace(
                "\"8000:8000\", \"7000:7000\", \"127.0.0.1:8001:8001\"",
                "\"127.0.0.1::8000\", \"127.0.0.1::7000\", \"127.0.0.1::8001\"",
            );
        std::fs::write(files.path().join("compose.yaml"), yaml).unwrap();
        Self { name, folder: files, owner }
    }

    fn compose(&self, words: &[&str]) -> String {
        let (done, said) = self.try_compose(words);
        assert!(done, "compose {words:?}: {said}");
        said
    }

    fn try_compose(&self, words: &[&str]) -> (bool, String) {
        // The test uses the old docker-compose if it is installed, else the plugin.
        let old = Command::new("docker-compose").arg("version").output().is_ok();
        let mut command = Command::new(if old { "docker-compose" } else { "docker" });
        if !old {
            command.arg("compose");
        }
        let file = self.folder.path().join("compose.yaml");
        command.args(["--project-directory", env!("CARGO_MANIFEST_DIR"), "--project-name", &self.name, "--file"]);
        let output = command.arg(file).args(words).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&said).trim().to_owned())
    }

    fn port(&self, port: &str) -> std::net::SocketAddr {
        self.compose(&["port", "ringway", port]).parse().unwrap()
    }

    async fn up(&self) {
        self.compose(&["up", "-d", "--no-build"]);
        self.all_healthy().await;
    }

    async fn all_healthy(&self) {
        let api = self.port("8001");
        eventually_async("three healthy replicas", async || {
            if tokio::net::TcpStream::connect(api).await.is_err() || get(api, "/readyz").await.0 != 200 {
                return false;
            }
            let status: serde_json::Value = serde_json::from_str(&get(api, "/api/status").await.1).unwrap();
            let backends = status["pools"][0]["backends"].as_array().unwrap();
            backends.len() == 3 && backends.iter().all(|backend| backend["state"] == "healthy")
        })
        .await;
    }

    /// The containers, networks and volumes of the project on the engine.
    fn remains(&self) -> String {
        let project = format!("label=com.docker.compose.project={}", self.name);
        let containers = self.owner.docker(&["ps", "-aq", "--filter", &project]);
        let networks = self.owner.docker(&["network", "ls", "-q", "--filter", &project]);
        let volumes = self.owner.docker(&["volume", "ls", "-q", "--filter", &project]);
        format!("{containers}{networks}{volumes}{}", self.owner.containers().join(" "))
    }
}

impl Drop for Project {
    fn drop(&mut self) {
        self.try_compose(&["down", "-v", "-t", "10"]);
        let ids = self.owner.containers();
        if !ids.is_empty() {
            self.owner.try_docker(&[&["rm", "-f"], &ids.iter().map(String::as_str).collect::<Vec<_>>()[..]].concat());
            self.try_compose(&["down", "-v"]);
        }
        self.owner.try_docker(&["rmi", "-f", &format!("ringway-test:{}", self.name)]);
    }
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn up_starts_replicas_restart_adopts_them_and_down_removes_them() {
    let project = Project::new().await;
    project.up().await;
    let web = project.port("8000");
    let answer = http(web, "POST", "/api/request", b"{\"data\": \"example\"}").await;
    let body = String::from_utf8(answer.body().to_vec()).unwrap();
    assert!(
        body.starts_with("{\"server\":\"echo-") && body.trim_end().ends_with("\"data\":{\"data\":\"example\"}}"),
        "{body}"
    );
    assert!(get(web, "/api/status").await.1.starts_with("{\"version\":"));

    let replicas = project.owner.containers();
    assert_eq!(replicas.len(), 3);
    project.compose(&["restart", "ringway"]);
    project.all_healthy().await;
    assert_eq!(project.owner.containers(), replicas, "the restart of Ringway replaced a replica");
    project.compose(&["restart"]);
    project.all_healthy().await;
    // A reaper that mistakes the replicas for leftovers would remove them in this time.
    tokio::time::sleep(std::time::Duration::from_secs(5)).await;
    assert_eq!(project.owner.containers(), replicas, "the restart of all services replaced a replica");

    project.owner.docker(&["kill", &project.owner.container("echo-1")]);
    eventually("a replacement", || {
        let now = project.owner.containers();
        now.len() == 3 && now != replicas
    })
    .await;
    project.all_healthy().await;

    let said = project.compose(&["down"]);
    assert_eq!(project.remains(), "", "{said}");
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn two_projects_do_not_touch_each_other_s_replicas() {
    let one = Project::new().await;
    let other = Project::beside(&one);
    one.up().await;
    other.up().await;
    let replicas = one.owner.containers();
    assert_eq!((replicas.len(), other.owner.containers().len()), (3, 3));
    assert!(!other.owner.containers().iter().any(|id| replicas.contains(id)));
    other.compose(&["down"]);
    assert_eq!(other.remains(), "");
    assert_eq!(one.owner.containers(), replicas);
    one.all_healthy().await;
    one.compose(&["stop"]);
    assert_eq!(one.owner.containers(), Vec::<String>::new(), "a stopped project has replicas");
    one.compose(&["start"]);
    one.all_healthy().await;
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn the_containers_have_few_privileges_and_report_their_health() {
    let project = Project::new().await;
    project.up().await;
    let id = project.compose(&["ps", "-q", "ringway"]);
    let inspect = |id: &str, what: &str| project.owner.docker(&["inspect", "-f", &format!("{{{{{what}}}}}"), id]);
    assert_eq!(inspect(&id, ".HostConfig.ReadonlyRootfs"), "true");
    assert_eq!(inspect(&id, ".HostConfig.CapDrop"), "[ALL]");
    assert_eq!(inspect(&id, ".HostConfig.SecurityOpt"), "[no-new-privileges:true]");
    assert_eq!(inspect(&id, ".HostConfig.PortBindings").matches("{127.0.0.1 ").count(), 2);
    let replica = project.owner.container("echo-1");
    assert_eq!(
        inspect(&replica, ".HostConfig.Privileged}} {{.HostConfig.Binds}} {{.HostConfig.NetworkMode").as_str(),
        format!("false [] {}_default", project.name).as_str()
    );
    assert_eq!(inspect(&replica, ".HostConfig.Memory"), (64 << 20).to_string());
    assert_eq!(inspect(&replica, ".HostConfig.NanoCpus"), "500000000");
    for container in [&id, &project.compose(&["ps", "-q", "reaper"]), &replica] {
        eventually("a healthy container", || inspect(container, ".State.Health.Status") == "healthy").await;
    }
    let size: u64 = project.owner.docker(&["image", "inspect", "-f", "{{.Size}}", IMAGE]).parse().unwrap();
    println!("the image has {:.1} MB", size as f64 / 1e6);
    assert!(size < 20_000_000);
    project.compose(&["down"]);
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn labels_in_a_compose_file_describe_the_backends() {
    let project = Project::of_example("labels").await;
    // Ringway is alive, and not ready: it has no backend yet.
    project.compose(&["up", "-d", "ringway"]);
    let check = |more: &[&str]| {
        let words = [&["exec", "-T", "ringway", "/ringway", "healthcheck"], more].concat();
        project.try_compose(&words)
    };
    eventually("a Ringway that is alive", || check(&["--live"]).0).await;
    let (is_ready, said) = check(&[]);
    assert!(!is_ready && said.contains("/readyz: 503"), "{said}");
    project.compose(&["up", "-d", "--scale", "web=2"]);
    let (web, api) = (project.port("8000"), project.port("8001"));
    let mut members = Vec::new();
    eventually_async("three and one healthy backends", async || {
        if tokio::net::TcpStream::connect(api).await.is_err() {
            return false;
        }
        let status: serde_json::Value = serde_json::from_str(&get(api, "/api/status").await.1).unwrap_or_default();
        members = (0..2)
            .flat_map(|n| status["pools"][n]["backends"].as_array().cloned().unwrap_or_default())
            .filter(|one| one["state"] == "healthy")
            .map(|one| (one["id"].as_str().unwrap().to_owned(), one["weight"].as_u64(), one["tier"].as_u64()))
            .collect();
        members.len() == 4
    })
    .await;
    let of = |service: &str| members.iter().filter(|(id, ..)| id.contains(service)).collect::<Vec<_>>();
    assert_eq!(of("web").len(), 2, "{members:?}");
    assert!(matches!(of("spare")[..], [(_, Some(1), Some(1))]), "{members:?}");
    assert!(matches!(of("raw")[..], [(_, Some(3), Some(0))]), "{members:?}");
    let answer = http(web, "POST", "/api/request", b"{}").await;
    let body = String::from_utf8(answer.body().to_vec()).unwrap();
    assert!(body.contains("\"server\":\"web\""), "{body}");
    project.compose(&["stop", "web"]);
    eventually_async("the spare takes over", async || {
        let answer = http(web, "POST", "/api/request", b"{}").await;
        String::from_utf8_lossy(answer.body()).contains("\"server\":\"spare\"")
    })
    .await;
}

/// As after `docker compose build`: a new Ringway starts, adopts the replicas, and rolls out the new image.
#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn up_with_a_new_image_rolls_out_the_replicas() {
    let project = Project::new().await;
    project.up().await;
    let images = || {
        let images = project
            .owner
            .containers()
            .into_iter()
            .map(|id| project.owner.try_docker(&["inspect", "-f", "{{.Image}} {{.State.Status}}", &id]).1);
        images.collect::<Vec<_>>()
    };
    let before = images();
    assert_eq!(before.len(), 3);
    let id = build(&project.owner, project.folder.path(), &project.name, 2);
    project.compose(&["up", "-d", "--no-build"]);
    let wanted = format!("{id} running");
    eventually("replicas of the new image", || images() == [wanted.clone(), wanted.clone(), wanted.clone()]).await;
    project.all_healthy().await;
}
