//! `ringway top`: a live view of a running Ringway in the terminal.
//!
//! - this file: the keys, the samples and the terminal; `top` restores it however it ends
//! - [`model`]: rows with rates from two samples; [`view`]: the screen

mod model;
mod view;

use std::io::IsTerminal as _;
use std::pin::Pin;
use std::time::{Duration, Instant};

use clap::Args;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ringway::api::sessions::{Page, Parameters, Shown};
use ringway::api::status::Status;
use ringway::control::command::{Command, Report};
use rustix::process::{Signal as ProcessSignal, getpid, kill_process};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

use self::model::{Row, Sort, arrange, rate, rows, speed};
use super::status::problems;
use super::table::{Narrow, table};
use super::terminal::Terminal;
use super::{Common, Failure, print, runtime, side_port};

/// How long Ringway may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Sessions that are shown.
const SESSIONS: usize = 200;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Time between two samples
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = humantime::parse_duration)]
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

/// What a key asks for.
#[derive(Debug, PartialEq, Eq)]
enum Wish {
    Nothing,
    Leave,
    /// A new sample at once.
    Sample,
    Run(Command),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tab {
    Backends,
    Sessions,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Mode {
    Normal,
    Help,
    /// The user types a filter.
    Filter,
    Confirm {
        question: String,
        command: Command,
    },
}

/// What the screen shows.
#[derive(Debug)]
struct Screen {
    has_colours: bool,
    is_unicode: bool,
    status: Option<Status>,
    /// Why the last sample failed.
    trouble: Option<String>,
    /// All rows of the last sample.
    all: Vec<Row>,
    /// Those that are shown.
    rows: Vec<Row>,
    sessions: Vec<Shown>,
    sort: Sort,
    filter: String,
    /// Pool and id of the chosen backend.
    selected: Option<(String, String)>,
    tab: Tab,
    mode: Mode,
    message: String,
}

impl Screen {
    fn new(has_colours: bool, is_unicode: bool) -> Self {
        Self {
            has_colours,
            is_unicode,
            status: None,
            trouble: None,
            all: Vec::new(),
            rows: Vec::new(),
            sessions: Vec::new(),
            sort: Sort::default(),
            filter: String::new(),
            selected: None,
            tab: Tab::Backends,
            mode: Mode::Normal,
            message: String::new(),
        }
    }

    /// Takes the answer to a call. Returns whether a new sample would show more.
    fn answered(&mut self, answer: Answer, sampled: &mut Instant) -> bool {
        match answer {
            Answer::Report(report) => {
                self.message = report.map_or_else(|error| format!("{error:#}"), |report| report.changes.join("; "));
                true
            }
            Answer::Sample(sample) => {
                match *sample {
                    Ok((status, sessions)) => {
                        self.take(status, sampled.elapsed());
                        (self.sessions, self.trouble, *sampled) = (sessions, None, Instant::now());
                    }
                    Err(error) => self.trouble = Some(format!("{error:#}; what you see is old")),
                }
                false
            }
        }
    }

    /// Takes a new sample.
    fn take(&mut self, status: Status, passed: Duration) {
        self.all = rows(self.status.as_ref().map(|before| (before, passed)), &status);
        self.status = Some(status);
        self.arrange();
    }

    fn arrange(&mut self) {
        self.rows.clone_from(&self.all);
        arrange(&mut self.rows, &self.filter, self.sort);
        if self.selected_index().is_none() {
            self.select(0);
        }
    }

    fn problems(&self) -> Vec<String> {
        let of_pools = self.status.iter().flat_map(|status| &status.pools).flat_map(problems);
        self.trouble.iter().cloned().chain(of_pools).collect()
    }

    fn selected_index(&self) -> Option<usize> {
        let (pool, id) = self.selected.as_ref()?;
        self.rows.iter().position(|row| row.pool == *pool && row.id == *id)
    }

    fn select(&mut self, index: usize) {
        self.selected = self.rows.get(index).map(|row| (row.pool.clone(), row.id.clone()));
    }

    fn key(&mut self, code: KeyCode, modifiers: KeyModifiers) -> Wish {
        match code {
            KeyCode::Char('c') if modifiers.contains(KeyModifiers::CONTROL) => Wish::Leave,
            KeyCode::Char('z') if modifiers.contains(KeyModifiers::CONTROL) => {
                // In raw mode, the terminal sends no signal.
                let _ = kill_process(getpid(), ProcessSignal::TSTP);
                Wish::Nothing
            }
            // Other keys with Control mean something else to people.
            KeyCode::Char(_) if modifiers.intersects(KeyModifiers::CONTROL | KeyModifiers::ALT) => Wish::Nothing,
            KeyCode::Char(key) => self.press(key),
            KeyCode::Esc => {
                if self.mode == Mode::Filter {
                    self.filter.clear();
                    self.arrange();
                }
                self.mode = Mode::Normal;
                self.message.clear();
                Wish::Nothing
            }
            KeyCode::Enter => {
                self.mode = Mode::Normal;
                Wish::Nothing
            }
            KeyCode::Backspace if self.mode == Mode::Filter => {
                self.filter.pop();
                self.arrange();
                Wish::Nothing
            }
            KeyCode::Down if self.mode == Mode::Normal => self.press('j'),
            KeyCode::Up if self.mode == Mode::Normal => self.press('k'),
            _ => Wish::Nothing,
        }
    }

    fn press(&mut self, key: char) -> Wish {
        match std::mem::replace(&mut self.mode, Mode::Normal) {
            Mode::Filter => {
                self.filter.push(key);
                self.mode = Mode::Filter;
                self.arrange();
                return Wish::Nothing;
            }
            Mode::Confirm { command, .. } => {
                self.message.clear();
                return if key == 'y' { Wish::Run(command) } else { Wish::Nothing };
            }
            Mode::Help => return Wish::Nothing,
            Mode::Normal => {}
        }
        self.message.clear();
        let index = self.selected_index().unwrap_or(0);
        match key {
            'q' => return Wish::Leave,
            '?' => self.mode = Mode::Help,
            '/' => self.mode = Mode::Filter,
            // These are about backends.
            'j' | 'k' | 'd' | 'u' if self.tab == Tab::Sessions => {}
            'j' => self.select((index + 1).min(self.rows.len().saturating_sub(1))),
            'k' => self.select(index.saturating_sub(1)),
            's' => {
                self.tab = if self.tab == Tab::Backends { Tab::Sessions } else { Tab::Backends };
                return Wish::Sample;
            }
            'd' | 'u' => self.ask(key == 'd'),
            _ => {
                if let Some((_, sort, _)) = Sort::ALL.iter().find(|(known, ..)| *known == key) {
                    self.sort = *sort;
                    self.arrange();
                }
            }
        }
        Wish::Nothing
    }

    /// Asks whether to drain or undrain the chosen backend.
    fn ask(&mut self, drains: bool) {
        let Some(row) = self.selected_index().map(|index| self.rows[index].clone()) else { return };
        let Row { pool, id: backend, share, now, is_drained, .. } = row;
        if drains == is_drained {
            self.message = format!("{pool}/{backend} is {}drained", if is_drained { "already " } else { "not " });
            return;
        }
        let name = format!("{pool}/{backend}");
        let (question, command) = if drains {
            let question = format!("Drain {name}? Its keys ({now} now) go to other backends.");
            (question, Command::Drain { pool, backend, within: None })
        } else {
            let question = format!("Undrain {name}? It gets its keys back ({share}).");
            (question, Command::Undrain { pool, backend })
        };
        self.mode = Mode::Confirm { question, command };
    }
}

#[cfg(test)]
mod tests {
    use super::model::tests::status;
    use super::*;

    fn screen() -> Screen {
        let mut screen = Screen::new(true, true);
        screen.take(status(1, &[("a", 100), ("b", 200)]), Duration::ZERO);
        screen
    }

    #[test]
    fn a_drain_needs_a_yes() {
        let mut screen = screen();
        assert_eq!(screen.press('j'), Wish::Nothing);
        assert_eq!(screen.press('d'), Wish::Nothing);
        assert_eq!(screen.press('x'), Wish::Nothing);
        assert_eq!(screen.mode, Mode::Normal);
        screen.press('d');
        let drain = Command::Drain { pool: "web".to_owned(), backend: "b".to_owned(), within: None };
        assert_eq!(screen.press('y'), Wish::Run(drain));
        screen.press('u');
        assert_eq!((screen.mode.clone(), screen.message.as_str()), (Mode::Normal, "web/b is not drained"));
    }

    #[test]
    fn the_chosen_backend_stays_chosen_when_rows_move() {
        let mut screen = screen();
        screen.press('a');
        assert_eq!(screen.rows[0].id, "b");
        assert_eq!(screen.selected_index(), Some(1), "a is still chosen");
        for key in "/web/b".chars() {
            screen.press(key);
        }
        assert_eq!((screen.rows.len(), screen.selected_index()), (1, Some(0)));
        screen.key(KeyCode::Esc, KeyModifiers::NONE);
        assert_eq!(screen.rows.len(), 2);
        screen.press('/');
        screen.key(KeyCode::Down, KeyModifiers::NONE);
        assert_eq!(screen.filter, "", "an arrow is no text");
        screen.key(KeyCode::Esc, KeyModifiers::NONE);
        screen.key(KeyCode::Char('d'), KeyModifiers::CONTROL);
        assert_eq!(screen.mode, Mode::Normal, "Ctrl-D asks for no drain");
        assert_eq!(screen.key(KeyCode::Char('c'), KeyModifiers::CONTROL), Wish::Leave);
    }
}
