//! Writes the provider of a pool as YAML.

use serde_yaml::Value;

use super::{auto_text, duration, list, map, off, words};
use crate::config::provider::ListedState;
use crate::config::{Containers, Process, Provider, Restart, Rollout, Scaled};
use crate::control::provider::dns::{self, Question, Servers};
use crate::labels::Label as _;

pub(super) fn provider(provider: &Provider) -> Value {
    match provider {
        Provider::Static(backends) => {
            let backends = backends.iter().map(|backend| {
                map([
                    ("address", backend.location.to_string().into()),
                    ("id", backend.id.as_str().into()),
                    ("weight", backend.membership.weight.into()),
                    ("tier", backend.membership.tier.into()),
                    ("state", ListedState::of(backend.membership).as_str().into()),
                    ("max_connections", backend.membership.max_connections.map_or("auto".into(), Into::into)),
                    ("resolve", backend.resolve.as_str().into()),
                ])
            });
            map([("static", list(backends))])
        }
        Provider::Process(settings) => map([("process", process(settings))]),
        Provider::Containers(settings) => map([("docker", containers(settings))]),
        Provider::Discover(settings) => {
            let mut discover = vec![("labels", settings.reads_labels.into())];
            discover.extend(settings.label.as_deref().map(|label| ("label", label.into())));
            discover.extend(settings.port.map(|port| ("port", port.into())));
            let discover = map(discover);
            let network = auto_text(settings.network.as_deref());
            map([("docker", map([("discover", discover), ("network", network)]))])
        }
        Provider::Dns(settings) => map([("dns", dns(settings))]),
        Provider::File(file) => {
            let path = file.path.display().to_string();
            map([("file", map([("path", path.into()), ("format", file.format.as_str().into())]))])
        }
    }
}

fn dns(dns: &dns::Settings) -> Value {
    let mut entries = match &dns.question {
        Question::Addresses { name, port } => vec![("name", name.as_str().into()), ("port", (*port).into())],
        Question::Services { name } => vec![("srv", name.as_str().into())],
    };
    let servers = match &dns.servers {
        Servers::System => "system".into(),
        Servers::Listed(servers) => list(servers.iter().map(|server| server.to_string().into())),
    };
    entries.extend([
        ("family", dns.family.as_str().into()),
        ("servers", servers),
        ("refresh", map([("min", duration(*dns.refresh.start())), ("max", duration(*dns.refresh.end()))])),
        ("timeout", duration(dns.timeout)),
        ("gone_after", duration(dns.gone_after)),
    ]);
    map(entries)
}

fn process(process: &Process) -> Value {
    let ports = process.ports.map_or("auto".to_owned(), |(first, last)| format!("{first}-{last}"));
    let mut entries = vec![
        ("replicas", replicas(process.replicas, process.scaled)),
        ("command", words(&process.spec.command)),
        ("env", pairs(&process.spec.env)),
    ];
    entries.extend((!process.spec.uses_sockets()).then(|| ("ports", ports.into())));
    entries.extend([
        ("restart", restart(&process.restart)),
        ("rollout", rollout(&process.rollout)),
        ("stop_grace", duration(process.stop_grace)),
    ]);
    map(entries)
}

fn containers(containers: &Containers) -> Value {
    let spec = &containers.spec;
    let number = replicas(containers.replicas, containers.scaled);
    let mut entries = vec![("replicas", number), ("image", spec.image.as_str().into())];
    entries.extend(spec.command.as_ref().map(|command| ("command", words(command))));
    entries.extend([
        ("port", spec.port.into()),
        ("network", auto_text(containers.network.as_deref())),
        ("env", pairs(&spec.env)),
        ("labels", pairs(&spec.labels)),
    ]);
    let memory = spec.memory.map(|bytes| ("memory", bytes.into()));
    let cpus = spec.milli_cpus.map(|cpus| ("cpus", (cpus as f64 / 1000.0).into()));
    entries.extend([
        ("resources", map(memory.into_iter().chain(cpus))),
        ("pull", spec.pull.as_str().into()),
        ("restart", restart(&containers.restart)),
        ("rollout", rollout(&containers.rollout)),
        ("stop_grace", duration(containers.stop_grace)),
    ]);
    map(entries)
}

fn replicas(replicas: u32, scaled: Option<Scaled>) -> Value {
    let Some(Scaled { scaling, wake_timeout, max_waiting }) = scaled else { return replicas.into() };
    let scale_on = scaling.by_load.map(|by_load| {
        let most = ("connections_per_replica", by_load.connections_per_replica.into());
        ("scale_on", map([most, ("cool_down", duration(by_load.cool_down))]))
    });
    let entries = [
        ("min", scaling.min.into()),
        ("max", replicas.into()),
        ("idle_stop", duration(scaling.idle_stop)),
        ("wake_timeout", duration(wake_timeout)),
        ("max_waiting", max_waiting.into()),
    ];
    map(entries.into_iter().chain(scale_on))
}

fn restart(restart: &Restart) -> Value {
    map([
        ("backoff", duration(restart.policy.backoff)),
        ("max_backoff", duration(restart.policy.max_backoff)),
        ("stable_after", duration(restart.policy.stable_after)),
        ("crash_loop_after", restart.policy.crash_loop_after.into()),
        ("start_grace", duration(restart.start_grace)),
        ("replace_after", off(restart.policy.replace_after.map(duration))),
    ])
}

fn rollout(rollout: &Rollout) -> Value {
    map([
        ("order", rollout.order.as_str().into()),
        ("parallel", rollout.parallel.into()),
        ("pause", duration(rollout.pause)),
        ("healthy_for", duration(rollout.healthy_for)),
        ("on_failure", rollout.on_failure.as_str().into()),
        ("drain", rollout.drain.map_or("auto".into(), duration)),
    ])
}

fn pairs(pairs: &[(String, String)]) -> Value {
    Value::Mapping(pairs.iter().map(|(name, value)| (name.as_str().into(), value.as_str().into())).collect())
}
