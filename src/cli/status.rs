//! `ringway status`: reads the status of a running Ringway and prints it as a table.

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use ringway::api::status::{Connections, Dns, Listener, Member, Pool, Replica, Status};

use super::table::{Cell, Narrow, clean, table};
use super::terminal::{Colour, Terminal};
use super::{Common, Failure, counted, duration, print, runtime, side_port};

/// Shortest time between two tables of `--watch`.
const SHORTEST: Duration = Duration::from_millis(100);

/// Moves the cursor to the first line, and clears what is below it.
const AGAIN: &str = "\x1b[H\x1b[J";

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Show only this pool
    pool: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Print the status again and again, at this interval [default interval: 2s]
    #[arg(long, value_name = "INTERVAL", num_args = 0..=1, default_missing_value = "2s", value_parser = duration, conflicts_with = "json")]
    watch: Option<Duration>,
    #[command(flatten)]
    port: side_port::Port,
}

pub(crate) fn status(common: &Common, options: &Options) -> Result<(), Failure> {
    runtime()?.block_on(async {
        let Some(interval) = options.watch else { return once(common, options).await };
        let is_terminal = std::io::stdout().is_terminal();
        loop {
            // Ringway may be away for a moment.
            let text = match read(common, options).await {
                Ok(status) => in_words(&status, Terminal::stdout()),
                Err(failure) => clean(&failure.to_string()) + "\n",
            };
            let text = if is_terminal { format!("{AGAIN}{text}") } else { format!("{text}\n") };
            // Its reader may have gone.
            if std::io::stdout().write_all(text.as_bytes()).and_then(|()| std::io::stdout().flush()).is_err() {
                return Ok(());
            }
            tokio::time::sleep(interval.max(SHORTEST)).await;
        }
    })
}

async fn once(common: &Common, options: &Options) -> Result<(), Failure> {
    if options.json && options.pool.is_none() {
        let answer = side_port::body(common, &options.port, "/api/status").await?;
        return print(&format!("{}\n", String::from_utf8_lossy(&answer)));
    }
    let status = read(common, options).await?;
    if options.json {
        // Text and numbers always serialize.
        return print(&(serde_json::to_string(&status).unwrap_or_default() + "\n"));
    }
    print(&in_words(&status, Terminal::stdout()))
}

/// The status, or the part of it that is about one pool.
async fn read(common: &Common, options: &Options) -> Result<Status, Failure> {
    let mut status = side_port::status(common, &options.port).await.context("cannot read the status")?;
    if let Some(wanted) = &options.pool {
        if status.pool(wanted).is_none() {
            let known: Vec<_> = status.pools.iter().map(|pool| pool.name.as_str()).collect();
            return Err(anyhow::anyhow!("there is no pool {wanted:?}; pools: {}", known.join(", ")).into());
        }
        status.pools.retain(|pool| pool.name == *wanted);
        let leads = |listener: &Listener| {
            listener.pool == *wanted || listener.routes.iter().any(|route| route.pool.as_ref() == Some(wanted))
        };
        status.listeners.retain(leads);
    }
    Ok(status)
}

fn in_words(status: &Status, terminal: Terminal) -> String {
    let ready = if status.ready { ("ready", Colour::Good) } else { ("not ready", Colour::Bad) };
    let ready = terminal.coloured(ready.0, Some(ready.1));
    let config = status.config.as_ref().map(|config| clean(&format!(", {config}"))).unwrap_or_default();
    let mut lines = vec![format!("Ringway {}, up {}, {ready}{config}", status.version, time(status.uptime_seconds))];
    let refused = status
        .config_error
        .as_ref()
        .map(|error| format!("the config file is not applied, and an earlier config runs: {}", on_one_line(error)));
    lines.extend(refused.map(|refused| terminal.coloured(&clean(&refused), Some(Colour::Bad))));
    for listener in &status.listeners {
        lines.extend(listener_in_words(listener, status));
    }
    for pool in &status.pools {
        lines.extend(problems(pool).into_iter().map(|problem| terminal.coloured(&clean(&problem), Some(Colour::Bad))));
        lines.extend(spill(pool).map(|spill| terminal.coloured(&clean(&spill), Some(Colour::Warning))));
        lines.extend(scaling(pool).map(|scaling| clean(&scaling)));
        lines.extend(rollout(pool).map(|rollout| terminal.coloured(&clean(&rollout), Some(Colour::Warning))));
        lines
            .extend(pool.provider.dns.as_ref().map(|dns| clean(&format!("pool {}: {}", pool.name, dns_in_words(dns)))));
        lines.extend(bound(pool));
        let differs = pool.differs.iter().map(|differs| format!("changed at run time: {}", differs.in_words()));
        lines.extend(differs.map(|differs| clean(&format!("pool {}: {differs}", pool.name))));
    }
    lines.push(String::new());
    lines.push(backends(status, terminal).trim_end().to_owned());
    let exits = status.pools.iter().flat_map(|pool| &pool.backends).filter(|backend| backend.replica.is_none());
    for (backend, exit) in exits.filter_map(|backend| Some((backend, backend.last_exit.as_ref()?))) {
        lines.push(clean(&format!("{}: {}, {} ago", backend.id, exit.reason, time(exit.seconds_ago))));
        let last = lines.len() - 1;
        lines[last].insert(0, '\n');
        lines.extend(exit.output.iter().map(|line| format!("  {}", clean(line))));
    }
    lines.join("\n") + "\n"
}

/// What the last look-up led to, and when the next one is due.
fn dns_in_words(dns: &Dns) -> String {
    let answered = match (dns.answered_seconds_ago, dns.ttl_seconds) {
        (None, _) => "no answer yet".to_owned(),
        (Some(ago), None) => format!("answered {} ago", time(ago)),
        (Some(ago), Some(ttl)) => format!("answered {} ago with a TTL of {}", time(ago), time(ttl)),
    };
    let (backends, next) = (counted(dns.backends as u64, "backend"), time(dns.next_in_seconds));
    format!("{backends} from {}, {answered}, next look-up in {next}", dns.question)
}

fn listener_in_words(listener: &Listener, status: &Status) -> Vec<String> {
    let Connections { active, total } = listener.connections;
    let is_pool = status.pools.iter().any(|pool| pool.name == listener.pool);
    let pool = if is_pool { format!("pool {}", listener.pool) } else { listener.pool.clone() };
    let address = listener.address.as_deref().unwrap_or("-");
    let mut lines =
        vec![format!("{} on {address}, {pool}: {}, {total} in total", listener.name, counted(active, "connection"))];
    lines.extend(listener.routes.iter().map(|route| {
        let to = route.pool.as_deref().map_or("reset".to_owned(), |pool| format!("pool {pool}"));
        format!("  route {} to {to}: {} in total", route.name, counted(route.connections, "connection"))
    }));
    lines
}

/// What is wrong with a pool.
pub(super) fn problems(pool: &Pool) -> Vec<String> {
    let mut problems = Vec::new();
    if let Some(error) = pool.provider.engine.as_ref().and_then(|engine| engine.error.as_ref()) {
        problems.push(format!("pool {}: {error}", pool.name));
    }
    if let Some(dns) = &pool.provider.dns
        && let Some(error) = &dns.error
    {
        problems
            .push(format!("pool {}: look-up of {} failed: {error}; the known backends stay", pool.name, dns.question));
    }
    if let Some(error) = pool.provider.file.as_ref().and_then(|file| file.error.as_ref()) {
        problems.push(format!("pool {}: {}; the backends of the last list stay", pool.name, on_one_line(error)));
    }
    if pool.panic {
        let what = "panic: too few backends are healthy, so Ringway tries all of them";
        problems.push(format!("pool {}: {what}", pool.name));
    } else if wakes(pool) {
        // `scaling` says so.
    } else if pool.backends.is_empty() {
        problems.push(format!("pool {}: no backends, so Ringway resets new connections", pool.name));
    } else if !pool.backends.iter().any(|backend| backend.state == "healthy") {
        problems.push(format!("pool {}: no healthy backend, so Ringway resets new connections", pool.name));
    }
    problems
}

/// Whether the pool sleeps, or connections wait until it is awake.
fn wakes(pool: &Pool) -> bool {
    pool.provider.scaling.as_ref().is_some_and(|scaling| scaling.wanted == 0 || scaling.waiting > 0)
}

/// An error of a file, which has a line for each fault.
fn on_one_line(error: &str) -> String {
    error.lines().map(str::trim).collect::<Vec<_>>().join("; ")
}

/// How far the bound of the pool moves keys; `None`: it has none.
fn bound(pool: &Pool) -> Option<String> {
    let displaced: u64 = pool.backends.iter().map(|backend| backend.connections.displaced).sum();
    let most = pool.backends.iter().filter_map(|backend| backend.limit).max().unwrap_or_default();
    let (bound, displaced) = (pool.bound?, counted(displaced, "connection"));
    Some(clean(&format!(
        "pool {}: at most {bound} % of the fair share, now {most} for a backend; {displaced} displaced",
        pool.name
    )))
}

/// Which tiers get keys, if not only the lowest one.
fn spill(pool: &Pool) -> Option<String> {
    let tiers: Vec<_> = pool.tiers.iter().map(ToString::to_string).collect();
    let what = "too few backends of the lowest tier are healthy, so the keys go to tier";
    pool.spilled.then(|| format!("pool {}: {what} {}", pool.name, tiers.join(" and ")))
}

/// How many replicas the pool has, if it scales by itself.
pub(super) fn scaling(pool: &Pool) -> Option<String> {
    let scaling = pool.provider.scaling.as_ref()?;
    let waiting = counted(scaling.waiting as u64, "connection");
    let said = match (scaling.wanted, scaling.waiting) {
        (0, 0) => "it sleeps until a connection comes".to_owned(),
        (wanted, 0) => format!("it has {wanted} of {} to {} replicas", scaling.min, scaling.max),
        _ => format!("it wakes up, and {waiting} wait"),
    };
    Some(format!("pool {}: {said}", pool.name))
}

/// How far a rollout is, and what it waits for, or why the last one failed; `None` if there is nothing to say.
pub(super) fn rollout(pool: &Pool) -> Option<String> {
    let rollout = pool.provider.rollout.as_ref()?;
    let left = rollout.total.saturating_sub(rollout.updated);
    let replicas = counted(rollout.total as u64, "replica");
    let reason = rollout.reason.as_deref().map(|reason| format!(": {reason}")).unwrap_or_default();
    let remedy = format!("Mend the settings and reload, or try again with `ringway rollout {}`", pool.name);
    let noun = if left == 1 { "has" } else { "have" };
    let said = match rollout.state.as_str() {
        "running" if rollout.held => {
            format!(
                "{left} of {replicas} still {noun} the old settings: Ringway waits until the old process has no connections"
            )
        }
        "running" if left == 0 => {
            "all replicas are new, and Ringway waits until they have been healthy for a while".to_owned()
        }
        "running" => {
            let is_awaited = |backend: &&Member| {
                let is_new = !backend.outdated && backend.drain.is_none();
                is_new && !["healthy", "standby"].contains(&backend.state.as_str())
            };
            let awaited = pool.backends.iter().find(is_awaited);
            let awaited = awaited.map(|backend| format!(": Ringway waits until {} is healthy", backend.id));
            format!("{left} of {replicas} still {noun} the old settings{}", awaited.unwrap_or_default())
        }
        "rolling_back" => {
            format!("it did not succeed, and {left} of {replicas} go back to the settings before{reason}")
        }
        "paused" => {
            format!("it did not succeed and is paused, {left} of {replicas} {noun} the old settings{reason}. {remedy}")
        }
        "rolled_back" => format!("it did not succeed, and all replicas have the settings before{reason}. {remedy}"),
        _ => return None,
    };
    Some(format!("pool {}: rollout: {said}", pool.name))
}

/// The table of backends.
fn backends(status: &Status, terminal: Terminal) -> String {
    let head = [
        "POOL", "BACKEND", "STATE", "ADDRESS", "REPLICA", "RESTARTS", "ACTIVE", "TOTAL", "FAILED", "SHARE", "NOW",
        "CHECK",
    ];
    let mut rows = vec![head.map(Cell::from)];
    for pool in &status.pools {
        let shares = percents(pool.backends.iter().map(|backend| backend.share));
        let now = percents(pool.backends.iter().map(|backend| backend.now));
        let shares = std::iter::zip(shares, now);
        rows.extend(std::iter::zip(&pool.backends, shares).map(|(backend, shares)| row(&pool.name, backend, shares)));
    }
    table(&rows, Narrow { shorten: &[1, 3, 4, 11], drop: &[5, 4, 7, 9, 8] }, terminal)
}

fn row(pool: &str, backend: &Member, (share, now): (String, String)) -> [Cell; 12] {
    let replica = backend.replica.as_ref().map(|replica| match replica {
        Replica::Process { pid } => format!("pid {pid}"),
        Replica::Container { name, .. } => name.clone(),
    });
    let or_dash = |text: Option<&String>| text.map_or("-", String::as_str).to_owned();
    [
        pool.into(),
        backend.id.as_str().into(),
        Cell::coloured(&backend.state, Some(colour(&backend.state))),
        or_dash(backend.address.as_ref()).into(),
        or_dash(replica.as_ref()).into(),
        backend.restarts.to_string().into(),
        backend.connections.active.to_string().into(),
        backend.connections.total.to_string().into(),
        backend.connections.failed.to_string().into(),
        share.into(),
        now.into(),
        check(backend).into(),
    ]
}

/// The last check, or what counts more: how a drain goes, or how the last replica ended.
fn check(backend: &Member) -> String {
    let left = backend.connections.active;
    match (&backend.drain, &backend.last_exit, &backend.health.last) {
        (Some(_), ..) if left == 0 => "drained".to_owned(),
        (Some(_), ..) => format!("{} left", counted(left, "connection")),
        (None, Some(exit), _) if backend.replica.is_none() => exit.reason.clone(),
        (None, _, Some(last)) if ["unhealthy", "starting", "standby"].contains(&backend.state.as_str()) => {
            format!("{last}, for {}", time(backend.health.since_seconds))
        }
        (None, _, last) => last.as_deref().unwrap_or("-").to_owned(),
    }
}

/// The colour of a backend's state.
pub(super) fn colour(state: &str) -> Colour {
    match state {
        "healthy" | "standby" => Colour::Good,
        "starting" | "draining" => Colour::Warning,
        _ => Colour::Bad,
    }
}

/// Parts of 1 as percentages with one digit. They add up to 100.0 if the parts add up to 1: the largest remainders are
/// rounded up (Hamilton's method).
pub(super) fn percents(parts: impl Iterator<Item = f64>) -> Vec<String> {
    let tenths: Vec<f64> = parts.map(|part| part * 1000.0).collect();
    let mut whole: Vec<u32> = tenths.iter().map(|&tenths| whole(tenths.floor())).collect();
    let missing = self::whole(tenths.iter().sum::<f64>().round()).saturating_sub(whole.iter().sum());
    let mut by_remainder: Vec<usize> = (0..tenths.len()).collect();
    by_remainder.sort_by(|&a, &b| tenths[b].fract().total_cmp(&tenths[a].fract()));
    for &n in by_remainder.iter().take(missing as usize) {
        whole[n] += 1;
    }
    whole.iter().map(|tenths| format!("{}.{} %", tenths / 10, tenths % 10)).collect()
}

/// A whole number that is not negative.
#[expect(clippy::cast_sign_loss, reason = "negative numbers become 0")]
fn whole(number: f64) -> u32 {
    number as u32
}

/// A time in its two largest units: `5 m 10 s`.
pub(super) fn time(seconds: f64) -> String {
    let seconds = seconds.max(0.0).round();
    let units = [("d", 86_400.0), ("h", 3600.0), ("m", 60.0), ("s", 1.0)];
    let first = units.iter().position(|(_, size)| seconds >= *size).unwrap_or(3);
    let mut left = seconds;
    let parts = units.iter().skip(first).take(2).map(|(name, size)| {
        let count = (left / size).floor();
        left -= count * size;
        (count, name)
    });
    let parts: Vec<_> = parts.enumerate().filter(|(n, (count, _))| *n == 0 || *count > 0.0).collect();
    let parts: Vec<_> = parts.iter().map(|(_, (count, name))| format!("{count} {name}")).collect();
    parts.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentages_add_up_to_a_hundred() {
        for parts in [vec![1.0 / 3.0; 3], vec![1.0 / 7.0; 7], vec![0.99996, 0.00004], vec![0.1234, 0.8766]] {
            let shown = percents(parts.iter().copied());
            let sum: f64 = shown.iter().map(|text| text.trim_end_matches(" %").parse::<f64>().unwrap()).sum();
            assert!((sum - 100.0).abs() < 1e-9, "{shown:?}");
        }
        assert_eq!(percents([1.0 / 3.0; 3].into_iter()), ["33.4 %", "33.3 %", "33.3 %"]);
        assert_eq!(percents([0.0, 0.0].into_iter()), ["0.0 %", "0.0 %"]);
    }

    #[test]
    fn a_time_has_its_two_largest_units() {
        for (seconds, text) in [
            (0.2, "0 s"),
            (59.6, "1 m"),
            (310.0, "5 m 10 s"),
            (3600.0, "1 h"),
            (7265.0, "2 h 1 m"),
            (200_000.0, "2 d 7 h"),
        ] {
            assert_eq!(time(seconds), text);
        }
    }
}
