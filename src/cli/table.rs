//! Tables on standard output: aligned columns that fit into the terminal.

use super::terminal::{Colour, Terminal};

/// What shortened text ends with.
const CUT: char = '…';

/// Shortest width of a column that is shortened.
const SHORTEST: usize = 10;

/// A cell: its text, and its colour on a terminal.
#[derive(Debug, Clone, Default)]
pub(super) struct Cell {
    text: String,
    colour: Option<Colour>,
}

impl Cell {
    pub(super) fn coloured(text: &str, colour: Option<Colour>) -> Self {
        Self { text: clean(text), colour }
    }

    fn shown(&self, width: usize, terminal: Terminal) -> String {
        let has_sign = terminal.has_colours && self.colour.is_some();
        let room = width.saturating_sub(if has_sign { 2 } else { 0 });
        let text = shortened(&self.text, room);
        let padding = " ".repeat(room - text.chars().count().min(room));
        terminal.coloured(&text, self.colour) + &padding
    }

    fn width(&self, terminal: Terminal) -> usize {
        let has_sign = terminal.has_colours && self.colour.is_some();
        self.text.chars().count() + if has_sign { 2 } else { 0 }
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self { text: clean(&text.into()), colour: None }
    }
}

/// Which columns give way on a narrow terminal.
#[derive(Debug, Clone, Copy)]
pub(super) struct Narrow {
    /// These become shorter, the widest first.
    pub(super) shorten: &'static [usize],
    /// If that is not enough, these go, in this order.
    pub(super) drop: &'static [usize],
}

/// Rows with aligned columns that fit into the terminal, if `narrow` allows it.
pub(super) fn table<const N: usize>(rows: &[[Cell; N]], narrow: Narrow, terminal: Terminal) -> String {
    let mut natural = [0; N];
    for row in rows {
        for (width, cell) in natural.iter_mut().zip(row) {
            *width = (*width).max(cell.width(terminal));
        }
    }
    let most = terminal.width.unwrap_or(usize::MAX);
    let mut columns: Vec<usize> = (0..N).collect();
    let mut drop = narrow.drop.iter();
    let widths = loop {
        let widths = fitted(&natural, &columns, narrow.shorten, most);
        let next = if total(&widths, &columns) > most { drop.next() } else { None };
        match next {
            Some(next) => columns.retain(|column| column != next),
            None => break widths,
        }
    };
    let line = |row: &[Cell; N]| {
        let cells: Vec<_> = columns.iter().map(|&column| row[column].shown(widths[column], terminal)).collect();
        cells.join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

/// The widths with the columns in `shorten` made shorter, as far as that is needed and possible.
fn fitted<const N: usize>(natural: &[usize; N], columns: &[usize], shorten: &[usize], most: usize) -> [usize; N] {
    let mut widths = *natural;
    while total(&widths, columns) > most {
        let may = |column: &&usize| columns.contains(column) && widths[**column] > SHORTEST;
        let Some(&widest) = shorten.iter().filter(may).max_by_key(|&&column| widths[column]) else { break };
        widths[widest] -= 1;
    }
    widths
}

fn total(widths: &[usize], columns: &[usize]) -> usize {
    columns.iter().map(|&column| widths[column]).sum::<usize>() + 2 * columns.len().saturating_sub(1)
}

/// The text without control characters, which a replica or a server could use to write elsewhere on the terminal.
pub(super) fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// The text, or its beginning and a sign if it is longer than `most` characters.
pub(super) fn shortened(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    let kept: String = text.chars().take(most.saturating_sub(1)).collect();
    kept + &CUT.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Narrow = Narrow { shorten: &[], drop: &[] };

    fn terminal(width: Option<usize>, has_colours: bool) -> Terminal {
        Terminal { has_colours, is_unicode: true, width }
    }

    #[test]
    fn a_narrow_terminal_shortens_the_flexible_columns() {
        let rows = [["ID", "ADDRESS", "N"].map(Cell::from), ["a", "unix:/run/a/long/path", "100"].map(Cell::from)];
        let narrow = Narrow { shorten: &[1], drop: &[2] };
        assert_eq!(
            table(&rows, narrow, terminal(None, false)),
            "ID  ADDRESS                N\na   unix:/run/a/long/path  100\n"
        );
        assert_eq!(
            table(&rows, narrow, terminal(Some(24), false)),
            "ID  ADDRESS          N\na   unix:/run/a/lo…  100\n"
        );
        assert_eq!(table(&rows, narrow, terminal(Some(14), false)), "ID  ADDRESS\na   unix:/run…\n");
        assert_eq!(table(&rows, narrow, terminal(Some(1), false)), "ID  ADDRESS\na   unix:/run…\n");
    }

    #[test]
    fn no_text_can_move_the_cursor() {
        assert_eq!(table(&[["a\x1b[2Jb\n".into()]], NONE, terminal(None, true)), "a\u{fffd}[2Jb\u{fffd}\n");
    }

    #[test]
    fn colours_have_a_sign_and_keep_the_columns_aligned() {
        let rows = [[Cell::from("STATE"), "N".into()], [Cell::coloured("healthy", Some(Colour::Good)), "1".into()]];
        let plain = table(&rows, NONE, terminal(None, false));
        assert_eq!(plain, "STATE    N\nhealthy  1\n");
        let coloured = table(&rows, NONE, terminal(None, true));
        assert_eq!(coloured, "STATE      N\n\x1b[32m● healthy\x1b[0m  1\n");
    }
}
