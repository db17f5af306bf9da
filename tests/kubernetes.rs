//! The manifests of examples/kubernetes: they are valid, and fit together.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use ringway::config::{Config, Provider};
use serde::Deserialize as _;
use serde_yaml::Value;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/kubernetes")
}

/// The documents of a manifest.
fn documents(file: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(folder().join(file)).unwrap();
    let parsed = serde_yaml::Deserializer::from_str(&text).map(|document| Value::deserialize(document).unwrap());
    parsed.collect()
}

/// The manifests that the kustomization names, and those that may replace them.
fn manifests() -> Vec<String> {
    let kustomization = &documents("kustomization.yaml")[0];
    let listed = kustomization["resources"].as_sequence().unwrap().iter().map(|file| file.as_str().unwrap().to_owned());
    listed.chain(["deployment.yaml", "podmonitor.yaml"].map(str::to_owned)).collect()
}

/// The only document of this kind.
fn of_kind(kind: &str) -> Value {
    let all = manifests().into_iter().flat_map(|file| documents(&file));
    let mut found: Vec<_> = all.filter(|one| one["kind"] == kind && one["metadata"]["name"] == "ringway").collect();
    assert_eq!(found.len(), 1, "{kind}");
    found.remove(0)
}

fn config() -> Config {
    Config::load(&folder().join("ringway.yaml")).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn the_manifests_follow_the_schemas_of_kubernetes() {
    let Some(library) = std::env::var_os("RINGWAY_KUBERNETES_VALIDATE") else {
        assert!(std::env::var_os("CI").is_none(), "the gate fetches kubernetes-validate");
        println!("RINGWAY_KUBERNETES_VALIDATE is not set to a folder with kubernetes-validate (PyPI): nothing checked");
        return;
    };
    let validate = |file: &Path| {
        let mut python = Command::new("python3");
        python.env("PYTHONPATH", &library).args(["-m", "kubernetes_validate", "--strict"]).arg(file).output().unwrap()
    };
    for file in manifests() {
        let output = validate(&folder().join(&file));
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        // A resource of the Prometheus Operator has no schema there.
        let is_foreign = file == "podmonitor.yaml" && said.contains("Couldn't find schema");
        assert!((output.status.success() && said.contains("passed")) || is_foreign, "{file}: {said}");
    }
    let mistaken = tempfile::NamedTempFile::with_suffix(".yaml").unwrap();
    let text = std::fs::read_to_string(folder().join("daemonset.yaml")).unwrap();
    std::fs::write(mistaken.path(), text.replace("readinessProbe", "readynessProbe")).unwrap();
    assert!(!validate(mistaken.path()).status.success(), "the schemas find no mistake");
}

#[test]
fn both_variants_run_the_same_pod() {
    let pod = |kind| {
        let mut pod = of_kind(kind)["spec"]["template"].clone();
        pod["spec"].as_mapping_mut().unwrap().remove("topologySpreadConstraints");
        pod
    };
    assert_eq!(pod("DaemonSet"), pod("Deployment"));
}

#[test]
fn a_pod_of_ringway_has_no_privileges_and_time_to_drain() {
    // The pods of the namespace, those of the backends included.
    let all = manifests().into_iter().flat_map(|file| documents(&file));
    let pods: Vec<_> = all.map(|one| one["spec"]["template"]["spec"].clone()).filter(|pod| !pod.is_null()).collect();
    assert_eq!(pods.len(), 3);
    for spec in pods {
        let container = &spec["containers"][0];
        for host in ["hostNetwork", "hostPID", "hostIPC"] {
            assert!(spec[host].is_null(), "{host}");
        }
        assert!(container["ports"].as_sequence().unwrap().iter().all(|port| port["hostPort"].is_null()));
        assert_eq!(spec["automountServiceAccountToken"], false);
        assert_eq!(spec["securityContext"]["runAsNonRoot"], true);
        assert_eq!(spec["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
        assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);
        assert_eq!(container["securityContext"]["allowPrivilegeEscalation"], false);
        assert_eq!(container["securityContext"]["capabilities"]["drop"][0], "ALL");
    }
    let (config, spec) = (config(), of_kind("DaemonSet")["spec"]["template"]["spec"].clone());
    let container = &spec["containers"][0];
    assert_eq!(of_kind("Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"], "restricted");

    let seconds = |value: &Value| Duration::from_secs(value.as_u64().unwrap());
    let drain = config.pools.iter().map(|pool| pool.drain).max().unwrap();
    assert!(seconds(&spec["terminationGracePeriodSeconds"]) > config.shutdown.delay + drain);
    let ready = &container["readinessProbe"];
    let noticed = seconds(&ready["periodSeconds"]) * ready["failureThreshold"].as_u64().unwrap() as u32;
    assert!(config.shutdown.delay > noticed, "the listeners close before Kubernetes has noticed");
}

#[test]
fn names_and_ports_of_the_manifests_and_the_config_fit_together() {
    let (config, spec) = (config(), of_kind("DaemonSet")["spec"]["template"]["spec"].clone());
    let container = &spec["containers"][0];
    let port = |name: &str| {
        let ports = container["ports"].as_sequence().unwrap();
        ports.iter().find(|port| port["name"] == name).unwrap()["containerPort"].as_u64().unwrap() as u16
    };
    assert_eq!(config.listeners[0].listen.ip().unwrap().port(), port("web"));
    // A side port on IPv6 alone would not answer the probes of an IPv4 cluster.
    assert!(config.api.listen.is_ipv4() && config.api.listen.ip().is_unspecified());
    assert_eq!(config.api.listen.port(), port("metrics"));
    for probe in ["readinessProbe", "livenessProbe"] {
        assert_eq!(container[probe]["httpGet"]["port"], "metrics");
    }
    assert_eq!(of_kind("PodMonitor")["spec"]["podMetricsEndpoints"][0]["port"], "metrics");
    assert_eq!(of_kind("Service")["spec"]["externalTrafficPolicy"], "Local");

    // The name of the pool is that of the headless service, and the network policy lets Ringway reach its pods.
    let Provider::Dns(dns) = &config.pools[0].provider else { panic!("{:?}", config.pools[0].provider) };
    let backends = documents("backends.yaml");
    let service = backends.iter().find(|one| one["kind"] == "Service").unwrap();
    assert_eq!(service["spec"]["clusterIP"], "None");
    let (name, namespace) = (&service["metadata"]["name"], &service["metadata"]["namespace"]);
    let name = format!("{}.{}.svc.cluster.local.", name.as_str().unwrap(), namespace.as_str().unwrap());
    let of_service = service["spec"]["ports"][0]["port"].as_u64().unwrap();
    assert_eq!(dns.question.to_string(), format!("{name} port {of_service}"));
    let policy = &of_kind("NetworkPolicy")["spec"];
    assert_eq!(policy["egress"][0]["to"][0]["podSelector"]["matchLabels"], service["spec"]["selector"]);
    assert_eq!(policy["egress"][0]["ports"][0]["port"].as_u64(), Some(of_service));
    assert_eq!(policy["ingress"][0]["ports"][0]["port"].as_u64(), Some(u64::from(port("web"))));

    // The config comes from the ConfigMap that kustomize makes, at the place that the arguments name.
    let kustomization = &documents("kustomization.yaml")[0];
    assert_eq!(kustomization["configMapGenerator"][0]["name"], spec["volumes"][0]["configMap"]["name"]);
    let mount = container["volumeMounts"][0]["mountPath"].as_str().unwrap();
    assert_eq!(container["args"][2], format!("{mount}/ringway.yaml"));
}
