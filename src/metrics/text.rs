//! Writes metrics as text, in pieces: the Prometheus text format 0.0.4, or OpenMetrics 1.0.

use std::fmt::{Display, Write as _};
use std::io;

use bytes::Bytes;
use metrics_exporter_prometheus::formatting::{sanitize_label_value, write_help_line, write_type_line};

use super::{Kind, Metric};

/// Length of a piece in bytes.
const PIECE: usize = 64 * 1024;

/// The text format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The Prometheus text format 0.0.4.
    Prometheus,
    /// OpenMetrics 1.0. The name of a counter's family lacks `_total`, there are no empty lines, and the text has an end mark.
    OpenMetrics,
}

impl Format {
    /// The value of the header `content-type`.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// A text that grows in pieces, so that no large one has to be moved.
#[derive(Debug)]
pub struct Text {
    format: Format,
    pieces: Vec<Bytes>,
    piece: String,
}

/// Labels with their values, written once for all metrics that share them: `pool="echo",backend="echo-1"`.
#[derive(Debug, Clone)]
pub struct Labels(String);

impl Labels {
    /// These labels and one more.
    #[must_use]
    pub fn and(&self, name: &str, value: &str) -> Self {
        Self(format!("{},{name}=\"{value}\"", self.0))
    }

    /// Labels with these names and values.
    pub fn new(names: &[&str], values: &[&str]) -> Self {
        let mut text = String::new();
        for (name, value) in std::iter::zip(names, values) {
            let separator = if text.is_empty() { "" } else { "," };
            // Writing to a String cannot fail.
            let _ = write!(text, "{separator}{name}=\"{}\"", sanitize_label_value(value));
        }
        Self(text)
    }
}

/// The samples of one metric.
#[derive(Debug)]
pub struct Samples<'a> {
    metric: &'static Metric,
    text: &'a mut Text,
    has_head: bool,
}

impl Text {
    /// An empty text.
    pub fn new(format: Format) -> Self {
        Self { format, pieces: Vec::new(), piece: String::with_capacity(PIECE) }
    }

    /// Begins a metric. Each metric has one place in the text.
    pub fn metric(&mut self, metric: &'static Metric) -> Samples<'_> {
        Samples { metric, text: self, has_head: false }
    }

    /// The finished text.
    pub fn finish(mut self) -> Vec<Bytes> {
        if self.format == Format::OpenMetrics {
            self.piece.push_str("# EOF\n");
        }
        self.cut();
        self.pieces
    }

    fn cut(&mut self) {
        let piece = std::mem::replace(&mut self.piece, String::with_capacity(PIECE));
        self.pieces.push(piece.into());
    }

    fn cut_if_long(&mut self) {
        // Lines are far shorter than this.
        if self.piece.len() > PIECE - 4096 {
            self.cut();
        }
    }
}

impl Samples<'_> {
    /// Adds a sample.
    pub fn add(&mut self, labels: &Labels, value: impl Display) {
        self.line(&labels.0, "", "", value);
    }

    /// Adds a sample with one more label.
    pub fn add_with(&mut self, labels: &Labels, last: &str, value: impl Display) {
        let name = self.metric.labels.last().copied().unwrap_or_default();
        self.line(&labels.0, name, last, value);
    }

    fn line(&mut self, labels: &str, name: &str, last: &str, value: impl Display) {
        if !std::mem::replace(&mut self.has_head, true) {
            self.head();
        }
        let piece = &mut self.text.piece;
        piece.push_str(self.metric.name);
        let separator = if labels.is_empty() || name.is_empty() { "" } else { "," };
        // Writing to a String cannot fail.
        let _ = match (labels, name) {
            ("", "") => writeln!(piece, " {value}"),
            (labels, "") => writeln!(piece, "{{{labels}}} {value}"),
            (labels, name) => writeln!(piece, "{{{labels}{separator}{name}=\"{last}\"}} {value}"),
        };
        self.text.cut_if_long();
    }

    fn head(&mut self) {
        let Metric { name, help, kind, .. } = self.metric;
        let (kind, family) = match (kind, self.text.format) {
            (Kind::Counter, Format::OpenMetrics) => ("counter", name.strip_suffix("_total").unwrap_or(name)),
            (Kind::Counter, Format::Prometheus) => ("counter", *name),
            (Kind::Gauge, _) => ("gauge", *name),
            (Kind::Histogram, _) => ("histogram", *name),
        };
        write_help_line(&mut self.text.piece, family, None, None, help);
        write_type_line(&mut self.text.piece, family, None, None, kind);
    }
}

/// Takes what the exporter writes: whole metrics, and empty lines between them.
impl io::Write for Text {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes != b"\n" {
            self.piece.push_str(&String::from_utf8_lossy(bytes));
            self.cut_if_long();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{CONNECT_FAILURES, READY};

    fn text(format: Format) -> String {
        let mut text = Text::new(format);
        let labels = Labels::new(&["pool", "backend"], &["echo", "a\"b\\c\nd"]);
        let mut samples = text.metric(&CONNECT_FAILURES);
        samples.add_with(&labels, "refused", 3);
        samples.add_with(&labels, "reset", 4);
        text.metric(&READY).add(&Labels::new(&[], &[]), 1);
        text.finish().iter().map(|piece| String::from_utf8_lossy(piece).into_owned()).collect()
    }

    #[test]
    fn each_format_has_its_names_and_its_end() {
        let lines = "ringway_connect_failures_total{pool=\"echo\",backend=\"a\\\"b\\\\c\\nd\",cause=\"refused\"} 3\n\
                     ringway_connect_failures_total{pool=\"echo\",backend=\"a\\\"b\\\\c\\nd\",cause=\"reset\"} 4\n";
        let plain = text(Format::Prometheus);
        assert!(plain.contains("# TYPE ringway_connect_failures_total counter\n") && plain.contains(lines), "{plain}");
        assert!(plain.ends_with("\nringway_ready 1\n"), "{plain}");
        let open = text(Format::OpenMetrics);
        assert!(open.contains("# TYPE ringway_connect_failures counter\n") && open.contains(lines), "{open}");
        assert!(open.ends_with("\nringway_ready 1\n# EOF\n"), "{open}");
    }

    #[test]
    fn a_long_text_has_many_pieces_that_end_with_lines() {
        let mut text = Text::new(Format::Prometheus);
        let labels = Labels::new(&["pool", "backend"], &["echo", &"x".repeat(200)]);
        for _ in 0..1000 {
            text.metric(&CONNECT_FAILURES).add_with(&labels, "refused", 1);
        }
        let pieces = text.finish();
        assert!(pieces.len() > 3 && pieces.iter().all(|piece| piece.len() <= PIECE && piece.ends_with(b"\n")));
    }
}
