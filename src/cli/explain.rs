//! `ringway explain`: why a connection goes to its backend, in words.

use std::fmt::Write as _;

use clap::Args;
use ringway::api::explain::Parameters;
use ringway::app::Offline;
use ringway::proxy::explain::{Explanation, PoolStep, WalkStep};

use super::{Common, Failure, print, runtime, side_port};

/// Backends on the walk that are printed.
const SHOWN: usize = 12;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Pool or listener [default: the first listener]
    target: Option<String>,
    /// Listener, if a pool has the same name
    #[arg(long, value_name = "LISTENER", conflicts_with = "target")]
    listener: Option<String>,
    /// The client: ADDRESS, ADDRESS:PORT or unix:UID
    #[arg(long, value_name = "CLIENT")]
    from: Option<String>,
    /// The server name of the client's TLS handshake
    #[arg(long, value_name = "NAME")]
    sni: Option<String>,
    /// A protocol that the client offers in its TLS handshake (several: with commas)
    #[arg(long, value_name = "PROTOCOL")]
    alpn: Option<String>,
    /// What the client sends first: tls, plain, silent (nothing) or undecided (a wrong TLS handshake)
    /// [default: tls with --sni or --alpn, else plain]
    #[arg(long, value_name = "WHAT")]
    begins: Option<String>,
    /// The key, in place of the client's
    #[arg(long, value_name = "TEXT")]
    key: Option<String>,
    /// What if this backend leaves? (several: with commas)
    #[arg(long, value_name = "BACKEND")]
    without: Option<String>,
    /// What if this backend has another weight? (several: with commas)
    #[arg(long, value_name = "BACKEND=WEIGHT")]
    weight: Option<String>,
    /// Read the config file instead of asking a running Ringway, and assume that all backends are healthy
    #[arg(long)]
    offline: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    port: side_port::Port,
}

pub(crate) fn explain(common: &Common, options: &Options) -> Result<(), Failure> {
    let parameters = Parameters {
        target: options.target.clone(),
        from: options.from.clone(),
        sni: options.sni.clone(),
        alpn: options.alpn.clone(),
        listener: options.listener.clone(),
        begins: options.begins.clone(),
        key: options.key.clone(),
        without: options.without.clone(),
        weight: options.weight.clone(),
    };
    let explanation = if options.offline {
        offline(common, &parameters)?
    } else {
        runtime()?.block_on(side_port::read(common, &options.port, &parameters.path()))?
    };
    if options.json {
        // Text and numbers always serialize.
        return print(&(serde_json::to_string_pretty(&explanation).unwrap_or_default() + "\n"));
    }
    print(&in_words(&explanation))
}

fn offline(common: &Common, parameters: &Parameters) -> Result<Explanation, Failure> {
    let config = common.config()?.0;
    let offline = Offline::new(&config).map_err(anyhow::Error::from)?;
    let mut explanation = offline.known().explain(parameters).map_err(anyhow::Error::from)?;
    if let Some(pool) = explanation.pool.as_ref().filter(|pool| pool.walk.is_empty()) {
        let problem = "Ringway finds its backends at run time, so only a running Ringway can explain it";
        return Err(anyhow::anyhow!("pool {}: {problem}", pool.name).into());
    }
    // Nothing was looked up.
    for step in explanation.pool.iter_mut().flat_map(|pool| &mut pool.walk) {
        step.address = None;
    }
    Ok(explanation)
}

// Writing to a String cannot fail.
fn in_words(explanation: &Explanation) -> String {
    let mut text = String::new();
    if let Some(client) = &explanation.client {
        let _ = writeln!(text, "client   {client}");
    }
    if let Some(refused) = &explanation.refused {
        let _ = writeln!(text, "refused  {refused}: Ringway resets the connection");
    }
    for route in &explanation.routes {
        let to = route.pool.as_deref().map_or("reset".to_owned(), |pool| format!("pool {pool}"));
        let sign = if route.matches { "->" } else { "no" };
        let _ = writeln!(text, "route    {sign} {} ({to}): {}", route.name, route.why);
    }
    match &explanation.pool {
        Some(pool) => pool_in_words(&mut text, pool),
        None => {
            let _ = writeln!(text, "result   Ringway resets the connection");
        }
    }
    text
}

fn pool_in_words(text: &mut String, pool: &PoolStep) {
    let _ = writeln!(text, "pool     {}, table {}, ring {}", pool.name, pool.table_generation, pool.ring_digest);
    if pool.balance == "least_connections" {
        let _ = writeln!(text, "balance  least_connections: the key decides nothing");
    }
    if let Some(bound) = pool.bound {
        let _ = writeln!(text, "bound    {bound} % of the fair share");
    }
    let _ = writeln!(text, "key      {} {}, hash {}", pool.key.kind, pool.key.bytes, pool.key.hash);
    for probe in &pool.probes {
        let sign = if probe.wins { "->" } else { "  " };
        let distance = probe.distance * 100.0;
        let _ = writeln!(
            text,
            "probe    {sign} {} to {}, {distance:.4} % of the circle: {}",
            probe.at, probe.point, probe.backend
        );
    }
    if pool.panic {
        let _ = writeln!(text, "panic    too few backends are healthy, so Ringway tries all of them");
    }
    let is_shown = |(n, step): &(usize, &WalkStep)| *n < SHOWN || step.attempt.is_some();
    for (_, step) in pool.walk.iter().enumerate().filter(is_shown) {
        let attempt = step.attempt.map_or("-".to_owned(), |attempt| attempt.to_string());
        let address = step.address.as_deref().map_or(String::new(), |address| format!(" ({address})"));
        let _ = writeln!(text, "walk     {attempt} {}{address}, {}: {}", step.backend, step.state, step.why);
    }
    let hidden = pool.walk.iter().enumerate().filter(|step| !is_shown(step)).count();
    if hidden > 0 {
        let _ = writeln!(text, "walk     … and {hidden} more; --json shows all");
    }
    let none = if pool.random { "chance decides" } else { "none: Ringway resets the connection" };
    let result = pool.backend.as_deref().unwrap_or(none);
    let _ = writeln!(text, "result   {result}");
    if let Some(what_if) = &pool.what_if {
        let backend = what_if.backend.as_deref().unwrap_or("none: Ringway would reset the connection");
        let _ = writeln!(text, "what if  {backend}; {:.1} % of all keys would move", what_if.moved * 100.0);
    }
}
