//! The screen of `ringway top`. Draws a state; changes nothing.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Block, Cell, Clear, Paragraph, Row as TableRow, Table, TableState};
use ringway::api::sessions::Shown;

use super::model::{Row, Sort, rate, speed};
use super::screen::{Mode, Screen, Tab};
use crate::cli::counted;
use crate::cli::status::{colour, time};
use crate::cli::table::clean;
use crate::cli::terminal::Colour;

const HELP: [&str; 12] = [
    "up, down, j, k   choose a backend",
    "d                drain the backend",
    "u                undrain the backend",
    "s                sessions, or backends again",
    "n                order of the config",
    "a                sort by active connections",
    "r                sort by connections per second",
    "e                sort by failed connects",
    "b                sort by bytes per second",
    "/                show only rows with a text",
    "?                this help",
    "q                quit",
];

pub(super) fn draw(frame: &mut Frame<'_>, screen: &Screen) {
    let problems = screen.problems();
    let head = 1 + u16::try_from(problems.len()).unwrap_or(0);
    let parts = Layout::vertical([Constraint::Length(head), Constraint::Min(3), Constraint::Length(1)]);
    let [top, middle, bottom] = parts.areas(frame.area());
    let mut lines = vec![Line::from(title(screen))];
    lines.extend(problems.iter().map(|problem| Line::styled(clean(problem), style(screen, Some(Colour::Bad)))));
    frame.render_widget(Paragraph::new(lines), top);
    match screen.tab {
        Tab::Backends => backends(frame, middle, screen),
        Tab::Sessions => sessions(frame, middle, screen),
    }
    frame.render_widget(Paragraph::new(Line::from(footer(screen))), bottom);
    if screen.mode == Mode::Help {
        help(frame, screen);
    }
}

fn title(screen: &Screen) -> String {
    let Some(status) = &screen.status else { return "Ringway: no status yet".to_owned() };
    let active: u64 = status.listeners.iter().map(|listener| listener.connections.active).sum();
    let ready = if status.ready { "ready" } else { "not ready" };
    format!(
        "Ringway {}, up {}, {ready}, {}",
        status.version,
        time(status.uptime_seconds),
        counted(active, "connection")
    )
}

fn footer(screen: &Screen) -> String {
    match &screen.mode {
        Mode::Filter => format!("/{}", screen.filter),
        Mode::Confirm { question, .. } => format!("{question} y/n"),
        _ if !screen.message.is_empty() => clean(&screen.message),
        _ => {
            let sort = Sort::ALL.iter().find(|(_, sort, _)| *sort == screen.sort).map_or("", |(.., name)| *name);
            let filter = if screen.filter.is_empty() { String::new() } else { format!(", only {:?}", screen.filter) };
            format!("sorted by {sort}{filter}   d drain  u undrain  s sessions  / filter  ? help  q quit")
        }
    }
}

fn backends(frame: &mut Frame<'_>, area: Rect, screen: &Screen) {
    let head = ["POOL", "BACKEND", "STATE", "ACTIVE", "CONN/s", "IN", "OUT", "FAILED", "SHARE", "NOW", "CHECK"];
    let rows = screen.rows.iter().map(|row| {
        let sign = if screen.has_colours { sign(colour(&row.state), screen.is_unicode) } else { "" };
        let cells = [
            clean(&row.pool),
            clean(&row.id),
            format!("{sign}{}", row.state),
            row.active.to_string(),
            rate(row.rate),
            speed(row.bytes.map(|(from, _)| from)),
            speed(row.bytes.map(|(_, to)| to)),
            row.failed.to_string(),
            row.share.clone(),
            row.now.clone(),
            clean(&row.check),
        ];
        let state = style(screen, Some(colour(&row.state)));
        TableRow::new(
            cells
                .into_iter()
                .enumerate()
                .map(move |(n, text)| Cell::from(text).style(if n == 2 { state } else { Style::default() })),
        )
    });
    let longest = |of: fn(&Row) -> &str, least: u16| {
        let most = screen.rows.iter().map(|row| of(row).chars().count()).max().unwrap_or(0);
        Constraint::Length(u16::try_from(most).unwrap_or(u16::MAX).clamp(least, 24))
    };
    let widths = [
        longest(|row| &row.pool, 4),
        longest(|row| &row.id, 7),
        Constraint::Length(12),
        Constraint::Length(6),
        Constraint::Length(6),
        Constraint::Length(9),
        Constraint::Length(9),
        Constraint::Length(6),
        Constraint::Length(7),
        Constraint::Length(7),
        Constraint::Fill(1),
    ];
    let table = Table::new(rows, widths)
        .header(TableRow::new(head).style(Style::default().add_modifier(Modifier::BOLD)))
        .row_highlight_style(Style::default().add_modifier(Modifier::REVERSED));
    let mut state = TableState::default().with_selected(screen.selected_index());
    frame.render_stateful_widget(table, area, &mut state);
}

fn sessions(frame: &mut Frame<'_>, area: Rect, screen: &Screen) {
    let head = ["CLIENT", "LISTENER", "POOL", "BACKEND", "AGE", "IDLE", "IN", "OUT", "STATE"];
    let or_dash = |text: &Option<String>| clean(text.as_deref().unwrap_or("-"));
    let rows = screen.sessions.iter().map(|one: &Shown| {
        TableRow::new([
            clean(&one.client),
            clean(&one.listener),
            or_dash(&one.pool),
            or_dash(&one.backend),
            time(one.age_seconds),
            time(one.idle_seconds),
            one.from_client.to_string(),
            one.to_client.to_string(),
            one.state.clone(),
        ])
    });
    let widths = [Constraint::Length(22), Constraint::Length(10), Constraint::Length(10), Constraint::Length(14)];
    let rest = [Constraint::Length(9); 4].into_iter().chain([Constraint::Fill(1)]);
    let table = Table::new(rows, widths.into_iter().chain(rest))
        .header(TableRow::new(head).style(Style::default().add_modifier(Modifier::BOLD)));
    frame.render_widget(table, area);
}

fn help(frame: &mut Frame<'_>, screen: &Screen) {
    let area = frame.area();
    let height = u16::try_from(HELP.len() + 2).unwrap_or(u16::MAX).min(area.height);
    let width = 56.min(area.width);
    let (x, y) = ((area.width - width) / 2, (area.height - height) / 2);
    let area = Rect { x: area.x + x, y: area.y + y, width, height };
    let border = if screen.is_unicode { Block::bordered() } else { Block::new() };
    frame.render_widget(Clear, area);
    let lines: Vec<_> = HELP.iter().map(|line| Line::from(*line)).collect();
    frame.render_widget(Paragraph::new(lines).block(border.title("Keys")), area);
}

fn style(screen: &Screen, colour: Option<Colour>) -> Style {
    let colour = colour.filter(|_| screen.has_colours).map(|colour| match colour {
        Colour::Good => Color::Green,
        Colour::Warning => Color::Yellow,
        Colour::Bad => Color::Red,
    });
    colour.map_or_else(Style::default, |colour| Style::default().fg(colour))
}

/// The sign of a state, for people who cannot tell the colours apart.
fn sign(colour: Colour, is_unicode: bool) -> &'static str {
    match (colour, is_unicode) {
        (Colour::Good, true) => "● ",
        (Colour::Warning, true) => "▲ ",
        (Colour::Bad, true) => "✖ ",
        (Colour::Good, false) => "+ ",
        (Colour::Warning, false) => "! ",
        (Colour::Bad, false) => "x ",
    }
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use std::time::Duration;

    use super::super::model::tests::status;
    use super::*;

    fn drawn(screen: &Screen, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, screen)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        let line = |y: u16| (0..width).map(|x| buffer[(x, y)].symbol().to_owned()).collect::<String>();
        (0..height).map(|y| line(y).trim_end().to_owned()).collect()
    }

    fn screen() -> Screen {
        let mut screen = Screen::new(false, false);
        screen.take(status(1, &[("a", 100), ("b", 200)]), Duration::from_secs(1));
        screen.take(status(1, &[("a", 150), ("b", 210)]), Duration::from_secs(1));
        screen
    }

    #[test]
    fn the_screen_has_a_title_rows_and_keys_in_every_width() {
        let wide = drawn(&screen(), 120, 12);
        assert_eq!(wide[0], "Ringway 1, up 5 m 10 s, ready, 0 connections");
        assert!(wide[1].starts_with("POOL BACKEND STATE"), "{wide:#?}");
        for cell in ["web", "a", "healthy", "15", "50", "5.0 kB/s", "50.0 MB/s", "50.0 %", "ok"] {
            assert!(wide[2].contains(cell), "{cell:?} is not in {:?}", wide[2]);
        }
        assert!(wide[11].contains("q quit"), "{wide:#?}");
        let narrow = drawn(&screen(), 80, 24);
        assert!(narrow[2].contains("50.0 MB/s") && narrow[2].contains("healthy"), "{narrow:#?}");
    }

    #[test]
    fn problems_stand_above_the_table_and_questions_below() {
        let mut screen = screen();
        screen.status.as_mut().unwrap().pools[0].panic = true;
        screen.press('d');
        let lines = drawn(&screen, 100, 12);
        assert!(lines[1].contains("pool web: panic"), "{lines:#?}");
        assert!(lines[11].contains("Drain web/a?") && lines[11].ends_with("y/n"), "{lines:#?}");
        screen.press('n');
        screen.press('?');
        assert!(drawn(&screen, 100, 30).iter().any(|line| line.contains("undrain the backend")));
    }
}
