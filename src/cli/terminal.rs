//! What the terminal can show: colours, signs and its width.

use std::io::IsTerminal;

use rustix::fd::AsFd;
use rustix::termios::tcgetwinsize;

/// What standard output can show.
#[derive(Debug, Clone, Copy)]
pub(super) struct Terminal {
    /// Colours, with a sign beside each.
    pub(super) has_colours: bool,
    /// Signs beyond ASCII.
    pub(super) is_unicode: bool,
    /// Columns; `None`: not a terminal, so lines may have any length.
    pub(super) width: Option<usize>,
}

/// A colour. Its meaning also shows in a sign, for people who cannot tell the colours apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Colour {
    Good,
    Warning,
    Bad,
}

impl Terminal {
    pub(super) fn stdout() -> Self {
        let stdout = std::io::stdout();
        let size = if stdout.is_terminal() { tcgetwinsize(&stdout).ok() } else { None };
        let width = size.map(|size| usize::from(size.ws_col)).filter(|&width| width > 0);
        Self { has_colours: has_colours(&stdout), is_unicode: is_unicode(), width }
    }

    /// The text in a colour, with its sign before it.
    pub(super) fn coloured(self, text: &str, colour: Option<Colour>) -> String {
        let Some(colour) = colour.filter(|_| self.has_colours) else { return text.to_owned() };
        let (code, sign, plain) = match colour {
            Colour::Good => (32, "●", "+"),
            Colour::Warning => (33, "▲", "!"),
            Colour::Bad => (31, "✖", "x"),
        };
        format!("\x1b[{code}m{} {text}\x1b[0m", if self.is_unicode { sign } else { plain })
    }
}

/// Whether an output shows colours: a terminal that is not `dumb`, unless the user sets `NO_COLOR` (no-color.org).
pub(super) fn has_colours(output: &(impl IsTerminal + AsFd)) -> bool {
    let is_set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    output.is_terminal() && !is_set("NO_COLOR") && std::env::var_os("TERM").is_some_and(|term| term != "dumb")
}

/// Whether the locale's text is UTF-8: the first of these variables that is set decides (locale(7)).
fn is_unicode() -> bool {
    let values = ["LC_ALL", "LC_CTYPE", "LANG"].iter().filter_map(|name| std::env::var(name).ok());
    let first = values.into_iter().find(|value| !value.is_empty()).unwrap_or_default().to_ascii_lowercase();
    first.contains("utf-8") || first.contains("utf8")
}
