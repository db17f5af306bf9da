//! What `ringway top` shows and what its keys do. Draws nothing and calls nobody.

use std::time::{Duration, Instant};

use ratatui::crossterm::event::{KeyCode, KeyModifiers};
use ringway::api::sessions::Shown;
use ringway::api::status::Status;
use ringway::control::command::Command;
use rustix::process::{Signal, getpid, kill_process};

use super::Answer;
use super::model::{Row, Sort, arrange, rows};
use crate::cli::status::{problems, rollout};

/// What a key asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Wish {
    Nothing,
    Leave,
    /// A new sample at once.
    Sample,
    Run(Command),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tab {
    Backends,
    Sessions,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Mode {
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
pub(super) struct Screen {
    pub(super) has_colours: bool,
    pub(super) is_unicode: bool,
    pub(super) status: Option<Status>,
    /// Why the last sample failed.
    pub(super) trouble: Option<String>,
    /// All rows of the last sample.
    pub(super) all: Vec<Row>,
    /// Those that are shown.
    pub(super) rows: Vec<Row>,
    pub(super) sessions: Vec<Shown>,
    pub(super) sort: Sort,
    pub(super) filter: String,
    /// Pool and id of the chosen backend.
    pub(super) selected: Option<(String, String)>,
    pub(super) tab: Tab,
    pub(super) mode: Mode,
    pub(super) message: String,
}

impl Screen {
    pub(super) fn new(has_colours: bool, is_unicode: bool) -> Self {
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
    pub(super) fn answered(&mut self, answer: Answer, sampled: &mut Instant) -> bool {
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
    pub(super) fn take(&mut self, status: Status, passed: Duration) {
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

    pub(super) fn problems(&self) -> Vec<String> {
        let of_pool = |pool| problems(pool).into_iter().chain(rollout(pool));
        let of_pools = self.status.iter().flat_map(|status| &status.pools).flat_map(of_pool);
        self.trouble.iter().cloned().chain(of_pools).collect()
    }

    pub(super) fn selected_index(&self) -> Option<usize> {
        let (pool, id) = self.selected.as_ref()?;
        self.rows.iter().position(|row| row.pool == *pool && row.id == *id)
    }

    fn select(&mut self, index: usize) {
        self.selected = self.rows.get(index).map(|row| (row.pool.clone(), row.id.clone()));
    }

    pub(super) fn key(&mut self, code: KeyCode, modifiers: KeyModifiers) -> Wish {
        match code {
            KeyCode::Char('c') if modifiers.contains(KeyModifiers::CONTROL) => Wish::Leave,
            KeyCode::Char('z') if modifiers.contains(KeyModifiers::CONTROL) => {
                // In raw mode, the terminal sends no signal.
                let _ = kill_process(getpid(), Signal::TSTP);
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

    pub(super) fn press(&mut self, key: char) -> Wish {
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
    use super::super::model::tests::status;
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
