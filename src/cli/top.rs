//! `ringway top`: a live view of a running Ringway in the terminal.
//!
//! - this file: the samples, and the terminal, which `top` restores however it ends
//! - [`screen`]: what is shown, and what the keys do; [`model`]: rows with rates from two samples; [`view`]: how it looks

mod model;
mod screen;
mod view;

use std::io::IsTerminal as _;
use std::pin::Pin;
use std::time::{Duration, Instant};

use clap::Args;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyEventKind};
use ringway::api::sessions::{Page, Parameters, Shown};
use ringway::api::status::Status;
use ringway::control::command::{Command, Report};
use rustix::process::{Signal as ProcessSignal, getpid, kill_process};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

use self::model::{rate, rows, speed};
use self::screen::{Screen, Tab, Wish};
use super::table::{Narrow, table};
use super::terminal::Terminal;
use super::{Common, Failure, duration, print, runtime, side_port};

/// How long Ringway may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Sessions that are shown.
const SESSIONS: usize = 200;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Time between two samples
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = duration)]
    interval: Duration,
    /// Show only this pool
    #[arg(long, value_name = "POOL")]
    pool: Option<String>,
    /// Print one table, with rates over one interval, and end
    #[arg(long)]
    once: bool,
    /// Show no colours
    #[arg(long)]
    no_color: bool,
    #[command(flatten)]
    port: side_port::Port,
}

pub(crate) fn top(common: &Common, options: &Options) -> Result<(), Failure> {
    let interval = options.interval.max(Duration::from_millis(100));
    if options.once || !std::io::stdout().is_terminal() || !std::io::stdin().is_terminal() {
        return runtime()?.block_on(once(common, options, interval));
    }
    let shown = Terminal::stdout();
    let mut screen = Screen::new(shown.has_colours && !options.no_color, shown.is_unicode);
    runtime()?.block_on(async {
        // Before the terminal changes: a wrong address is an ordinary error.
        screen.take(read(common, options).await?, Duration::ZERO);
        let mut terminal = ratatui::try_init().map_err(terminal_failed)?;
        let outcome = live(&mut terminal, &mut screen, common, options, interval).await;
        ratatui::restore();
        outcome
    })
}

fn terminal_failed(error: std::io::Error) -> Failure {
    Failure::Other(anyhow::Error::from(error).context("cannot use the terminal"))
}

async fn read(common: &Common, options: &Options) -> anyhow::Result<Status> {
    let mut status = side_port::status(common, &options.port).await?;
    if let Some(pool) = &options.pool {
        status.pools.retain(|known| known.name == *pool);
        anyhow::ensure!(!status.pools.is_empty(), "there is no pool {pool:?}");
    }
    Ok(status)
}

/// One plain table.
async fn once(common: &Common, options: &Options, interval: Duration) -> Result<(), Failure> {
    let (first, began) = (read(common, options).await?, Instant::now());
    tokio::time::sleep(interval).await;
    let second = read(common, options).await?;
    let head = ["POOL", "BACKEND", "STATE", "ACTIVE", "CONN/s", "IN", "OUT", "FAILED", "SHARE", "NOW", "CHECK"];
    let mut cells = vec![head.map(Into::into)];
    cells.extend(rows(Some((&first, began.elapsed())), &second).into_iter().map(|row| {
        [
            row.pool,
            row.id,
            row.state,
            row.active.to_string(),
            rate(row.rate),
            speed(row.bytes.map(|(from, _)| from)),
            speed(row.bytes.map(|(_, to)| to)),
            row.failed.to_string(),
            row.share,
            row.now,
            row.check,
        ]
        .map(Into::into)
    }));
    print(&table(&cells, Narrow { shorten: &[1, 10], drop: &[8] }, Terminal::stdout()))
}

/// The signals that end the view, and the one that pauses it.
struct Signals {
    end: [Signal; 3],
    pause: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        let end = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()];
        let [first, second, third] = end.map(signal);
        let pause = signal(SignalKind::from_raw(ProcessSignal::TSTP.as_raw()))?;
        Ok(Self { end: [first?, second?, third?], pause })
    }

    /// Whether the view ends; otherwise it pauses.
    async fn next(&mut self) -> bool {
        let [first, second, third] = &mut self.end;
        tokio::select! {
            _ = first.recv() => true,
            _ = second.recv() => true,
            _ = third.recv() => true,
            _ = self.pause.recv() => false,
        }
    }
}

/// Shows the screen until the user leaves, or a signal asks for the end. Calls to Ringway run beside the keys: it may not answer.
async fn live(
    terminal: &mut DefaultTerminal,
    screen: &mut Screen,
    common: &Common,
    options: &Options,
    interval: Duration,
) -> Result<(), Failure> {
    let (mut keys, mut signals) = (keys(), Signals::new().map_err(terminal_failed)?);
    let mut ticks = tokio::time::interval_at((Instant::now() + interval).into(), interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut sampled = Instant::now();
    let mut call: Option<Pin<Box<dyn Future<Output = Answer> + '_>>> = None;
    loop {
        terminal.draw(|frame| view::draw(frame, screen)).map_err(terminal_failed)?;
        let answer = async {
            match &mut call {
                Some(call) => call.await,
                None => std::future::pending().await,
            }
        };
        let wish = tokio::select! {
            ends = signals.next() => {
                if ends {
                    return Ok(());
                }
                // A stopped program must leave the terminal to the shell.
                ratatui::restore();
                let _ = kill_process(getpid(), ProcessSignal::STOP);
                *terminal = ratatui::try_init().map_err(terminal_failed)?;
                continue;
            }
            answer = answer => {
                call = None;
                if screen.answered(answer, &mut sampled) { Wish::Sample } else { Wish::Nothing }
            }
            _ = ticks.tick() => Wish::Sample,
            key = keys.recv() => match key {
                Some(Event::Key(key)) if key.kind == KeyEventKind::Press => screen.key(key.code, key.modifiers),
                // The terminal has gone.
                None => return Ok(()),
                Some(_) => Wish::Nothing,
            },
        };
        match wish {
            Wish::Leave => return Ok(()),
            Wish::Run(command) => call = Some(Box::pin(run(common, options, command))),
            // One call at a time.
            Wish::Sample if call.is_none() => call = Some(Box::pin(sample(common, options, screen.tab))),
            Wish::Sample | Wish::Nothing => {}
        }
    }
}

/// What a call to Ringway has given.
enum Answer {
    Sample(Box<anyhow::Result<(Status, Vec<Shown>)>>),
    Report(anyhow::Result<Report>),
}

async fn run(common: &Common, options: &Options, command: Command) -> Answer {
    Answer::Report(side_port::run(common, &options.port, &command).await)
}

async fn sample(common: &Common, options: &Options, tab: Tab) -> Answer {
    let sample = async {
        let status = read(common, options).await?;
        if tab == Tab::Backends {
            return Ok((status, Vec::new()));
        }
        let parameters = Parameters { limit: Some(SESSIONS), pool: options.pool.clone(), ..Parameters::default() };
        let page = side_port::read::<Page>(common, &options.port, &parameters.path()).await?;
        anyhow::Ok((status, page.sessions))
    };
    let sample = tokio::time::timeout(PATIENCE, sample).await;
    Answer::Sample(Box::new(sample.unwrap_or_else(|_| Err(anyhow::anyhow!("Ringway does not answer")))))
}

/// The events of the terminal, from a thread of their own: reading them blocks.
fn keys() -> mpsc::UnboundedReceiver<Event> {
    let (sender, receiver) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        while let Ok(event) = event::read() {
            if sender.send(event).is_err() {
                return;
            }
        }
    });
    receiver
}
