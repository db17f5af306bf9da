//! `ringway sessions` and `ringway kill`: the open connections of a running Ringway.

use std::time::Duration;

use clap::Args;
use ringway::api::encoded;
use ringway::api::sessions::{Ended, MOST, Page, Parameters, Shown};

use super::table::{Cell, Narrow, table};
use super::terminal::Terminal;
use super::{Common, Failure, counted, print, runtime, side_port};

/// Which connections.
#[derive(Debug, Args)]
struct Filter {
    /// Only connections of this listener
    #[arg(long)]
    listener: Option<String>,
    /// Only connections to this pool
    #[arg(long)]
    pool: Option<String>,
    /// Only connections to this backend
    #[arg(long)]
    backend: Option<String>,
    /// Only connections of clients in these networks, like 10.0.0.0/8 (several: with commas)
    #[arg(long, value_name = "NETWORK")]
    source: Option<String>,
    /// Only connections for this server name
    #[arg(long, value_name = "NAME")]
    sni: Option<String>,
    /// Only connections at least this old, like 1h
    #[arg(long, value_name = "DURATION")]
    older: Option<String>,
    /// Only connections without a byte for this long, like 10m
    #[arg(long, value_name = "DURATION")]
    idle: Option<String>,
    /// Only connections in this state: connecting, open, half-closed (`half_closed`) or blocked
    #[arg(long)]
    state: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct List {
    #[command(flatten)]
    filter: Filter,
    /// Maximum number of connections
    #[arg(long, default_value_t = 100)]
    limit: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    port: side_port::Port,
}

#[derive(Debug, Args)]
pub(crate) struct Kill {
    /// Ids of connections
    ids: Vec<String>,
    #[command(flatten)]
    filter: Filter,
    /// End every open connection
    #[arg(long)]
    all: bool,
    /// Show the connections that match, and end none
    #[arg(long, conflicts_with = "ids")]
    dry_run: bool,
    #[command(flatten)]
    port: side_port::Port,
}

impl Filter {
    fn parameters(&self) -> Parameters {
        // As other commands write a backend: POOL/BACKEND. A path of a Unix socket has slashes too.
        let both = self.backend.as_deref().filter(|backend| !backend.starts_with("unix:"));
        let both = both.and_then(|backend| backend.split_once('/')).filter(|_| self.pool.is_none());
        Parameters {
            listener: self.listener.clone(),
            pool: both.map(|(pool, _)| pool.to_owned()).or_else(|| self.pool.clone()),
            backend: both.map(|(_, backend)| backend.to_owned()).or_else(|| self.backend.clone()),
            source: self.source.clone(),
            sni: self.sni.clone(),
            older: self.older.clone(),
            idle: self.idle.clone(),
            state: self.state.clone(),
            ..Parameters::default()
        }
    }
}

/// The sessions that match, up to `limit`.
fn list_all(common: &Common, port: &side_port::Port, filter: &Filter, limit: usize) -> anyhow::Result<Vec<Shown>> {
    runtime()?.block_on(async {
        let (mut sessions, mut cursor) = (Vec::new(), None);
        while sessions.len() < limit {
            let limit = Some((limit - sessions.len()).min(MOST));
            let parameters = Parameters { limit, cursor, ..filter.parameters() };
            let page: Page = side_port::read(common, port, &parameters.path()).await?;
            sessions.extend(page.sessions);
            cursor = page.next;
            if cursor.is_none() {
                break;
            }
        }
        Ok(sessions)
    })
}

pub(crate) fn list(common: &Common, list: &List) -> Result<(), Failure> {
    let sessions = list_all(common, &list.port, &list.filter, list.limit)?;
    if list.json {
        // Text and numbers always serialize.
        return print(&(serde_json::to_string_pretty(&sessions).unwrap_or_default() + "\n"));
    }
    print(&list_of(&sessions))
}

pub(crate) fn kill(common: &Common, kill: &Kill) -> Result<(), Failure> {
    let filter = Parameters { all: kill.all.then_some(true), ..kill.filter.parameters() };
    let by_filter = filter != Parameters::default();
    if kill.ids.is_empty() != by_filter {
        return Err(anyhow::anyhow!("give ids, or conditions like --source, or --all").into());
    }
    if kill.dry_run {
        let matching = list_all(common, &kill.port, &kill.filter, usize::MAX)?;
        return print(&format!("{}would end {}\n", list_of(&matching), sessions(matching.len())));
    }
    let ended = runtime()?.block_on(async {
        if by_filter {
            return side_port::delete::<Ended>(common, &kill.port, &filter.path()).await.map(|ended| ended.ended);
        }
        let (mut sum, mut problems) = (0, Vec::new());
        for id in &kill.ids {
            match side_port::delete::<Ended>(common, &kill.port, &format!("/api/sessions/{}", encoded(id))).await {
                Ok(ended) => sum += ended.ended,
                Err(problem) => problems.push(format!("{id}: {problem:#}")),
            }
        }
        anyhow::ensure!(problems.is_empty(), "ended {}; {}", sessions(sum), problems.join("; "));
        Ok(sum)
    })?;
    print(&format!("ended {}\n", sessions(ended)))
}

fn sessions(count: usize) -> String {
    counted(count as u64, "session")
}

fn list_of(sessions: &[Shown]) -> String {
    let head = [
        "ID", "CLIENT", "PEER", "LISTENER", "ROUTE", "POOL", "BACKEND", "AGE", "IDLE", "IN", "OUT", "PATH", "STATE",
        "SNI",
    ];
    let time = |seconds: f64| {
        humantime::format_duration(Duration::from_secs_f64(seconds.trunc())).to_string().replace(' ', "")
    };
    let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
    let row = |one: &Shown| {
        [
            one.id.clone(),
            one.client.clone(),
            or_dash(&one.peer),
            one.listener.clone(),
            or_dash(&one.route),
            or_dash(&one.pool),
            or_dash(&one.backend),
            time(one.age_seconds),
            time(one.idle_seconds),
            one.from_client.to_string(),
            one.to_client.to_string(),
            one.path.clone(),
            one.state.clone(),
            or_dash(&one.sni),
        ]
    };
    let rows: Vec<_> =
        std::iter::once(head.map(Cell::from)).chain(sessions.iter().map(|one| row(one).map(Cell::from))).collect();
    table(&rows, Narrow { shorten: &[1, 2, 4, 6, 13], drop: &[2, 11, 4, 13, 3] }, Terminal::stdout())
}
