//! Tables of figures as text for a terminal, as Markdown and as HTML.

/// A table.
#[derive(Debug, Clone, Default)]
pub struct Table {
    /// The headings. The first column has the names of the rows.
    pub columns: Vec<String>,
    /// The rows. Each has one cell for each column.
    pub rows: Vec<Vec<String>>,
}

impl Table {
    /// Creates a table without rows.
    pub fn new(columns: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self { columns: columns.into_iter().map(Into::into).collect(), rows: Vec::new() }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = impl Into<String>>) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }

    /// Formats the table as text. Names are left-aligned and figures are right-aligned.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for row in std::iter::once(&self.columns).chain(&self.rows) {
            let cells = row.iter().enumerate().map(|(index, cell)| {
                let width = self.width(index);
                let space = " ".repeat(width - cell.chars().count());
                if index == 0 { format!("{cell}{space}") } else { format!("{space}{cell}") }
            });
            text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
            text.push('\n');
        }
        text
    }

    /// Formats the table as Markdown.
    pub fn markdown(&self) -> String {
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let under: Vec<_> =
            (0..self.columns.len()).map(|index| if index == 0 { "---" } else { "---:" }.to_owned()).collect();
        let rows = self.rows.iter().map(|row| line(row));
        [line(&self.columns), line(&under)].into_iter().chain(rows).collect()
    }

    /// Formats the table as HTML.
    pub fn html(&self) -> String {
        let line = |tag: &str, cells: &[String]| {
            let cells: Vec<_> = cells.iter().map(|cell| format!("<{tag}>{}</{tag}>", escape(cell))).collect();
            let cells = cells.concat();
            format!("<tr>{cells}</tr>\n")
        };
        let rows: String = self.rows.iter().map(|row| line("td", row)).collect();
        format!("<table>\n{}{rows}</table>\n", line("th", &self.columns))
    }

    fn width(&self, column: usize) -> usize {
        let cells = std::iter::once(&self.columns).chain(&self.rows).filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    }
}

/// Creates a self-contained HTML page with a title and these parts.
pub fn page(title: &str, parts: &[String]) -> String {
    const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:940px;margin:2em auto;padding:0 1em;color:#222}\
        table{border-collapse:collapse;margin:1em 0}th,td{padding:.25em .8em;border-bottom:1px solid #ddd;text-align:right}\
        th:first-child,td:first-child{text-align:left}svg{max-width:100%;height:auto;margin:.5em 0}";
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title><style>{STYLE}</style></head>\n\
         <body><h1>{title}</h1>\n{}</body></html>\n",
        parts.concat(),
        title = escape(title)
    )
}

/// Escapes text for HTML.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_has_the_same_cells() {
        let mut table = Table::new(["server", "answers"]);
        table.row(["echo-1", "7"]);
        table.row(["<b>", "1234567"]);
        assert_eq!(table.text(), "server  answers\necho-1        7\n<b>     1234567\n");
        assert_eq!(table.markdown(), "| server | answers |\n| --- | ---: |\n| echo-1 | 7 |\n| <b> | 1234567 |\n");
        let page = page("a & b", &[table.html()]);
        assert!(page.contains("<td>&lt;b&gt;</td><td>1234567</td>") && page.contains("<h1>a &amp; b</h1>"));
    }
}
