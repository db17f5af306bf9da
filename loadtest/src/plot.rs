//! Plots as SVG text: lines on a common axis, bars, and ranges.

use std::fmt::Write as _;

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::spread::Spread;

/// Width of a plot in pixels.
const WIDTH: u32 = 900;

/// Height of lines and bars in pixels.
const HEIGHT: u32 = 260;

/// Height of one range in pixels.
const RANGE: u32 = 26;

/// Width of the names of ranges in pixels.
const NAMES: i32 = 260;

/// Width of the figures of ranges in pixels.
const FIGURES: i32 = 190;

/// A range that ends beyond this many times the median of all ends is cut: it would squash the others.
const OUTLIER: f64 = 4.0;

/// The colours differ in brightness too, so a print in black and white stays readable.
const COLOURS: [RGBColor; 6] = [
    RGBColor(31, 95, 168),
    RGBColor(217, 106, 27),
    RGBColor(46, 130, 72),
    RGBColor(150, 60, 120),
    RGBColor(120, 120, 120),
    RGBColor(200, 160, 30),
];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// A line.
#[derive(Debug, Clone)]
pub struct Line {
    /// The name in the legend.
    pub name: String,
    /// The points from left to right.
    pub points: Vec<(f64, f64)>,
}

impl Line {
    /// Creates a line through these points.
    pub fn new(name: impl Into<String>, points: impl IntoIterator<Item = (f64, f64)>) -> Self {
        Self { name: name.into(), points: points.into_iter().collect() }
    }
}

/// A measured figure with its spread.
#[derive(Debug, Clone)]
pub struct Range {
    /// The name beside the range.
    pub name: String,
    /// The lowest figure, the median and the highest figure.
    pub spread: Spread,
    /// Whether it stands out in another colour.
    pub is_own: bool,
}

/// Draws lines on a common axis, with a legend for several lines.
///
/// # Errors
/// When there is nothing to draw.
pub fn lines(title: &str, x: &str, lines: &[Line]) -> anyhow::Result<String> {
    let points = || lines.iter().flat_map(|line| &line.points).filter(|(x, y)| x.is_finite() && y.is_finite());
    let right = points().map(|point| point.0).fold(0.0, f64::max);
    anyhow::ensure!(right > 0.0, "{title}: there is nothing to draw");
    let left = points().map(|point| point.0).fold(right, f64::min);
    // The legend stands above the lines.
    let room = if lines.len() > 1 { 1.4 } else { 1.12 };
    let top = points().map(|point| point.1).fold(0.0, f64::max).max(1e-9) * room;
    draw(HEIGHT, |area| {
        let mut chart = ChartBuilder::on(area)
            .caption(title, ("sans-serif", 15))
            .margin(8)
            .margin_right(28)
            .x_label_area_size(36)
            .y_label_area_size(64)
            .build_cartesian_2d(left.min(right * 0.99)..right, 0.0..top)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .y_labels(5)
            .y_label_formatter(&|value| tick(*value, top))
            .x_desc(x)
            .x_label_formatter(&|value| tick(*value, right))
            .draw()?;
        for (line, colour) in std::iter::zip(lines, COLOURS.iter().cycle()) {
            let series = chart.draw_series(LineSeries::new(line.points.iter().copied(), colour.stroke_width(2)))?;
            if lines.len() > 1 {
                series
                    .label(line.name.as_str())
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
            }
        }
        if lines.len() > 1 {
            chart
                .configure_series_labels()
                .position(SeriesLabelPosition::UpperLeft)
                .border_style(TRANSPARENT)
                .draw()?;
        }
        Ok(())
    })
}

/// Draws a bar for each figure, with its name below and its value above.
///
/// # Errors
/// When the list is empty.
pub fn bars(title: &str, bars: &[(String, f64)]) -> anyhow::Result<String> {
    anyhow::ensure!(!bars.is_empty(), "{title}: there is nothing to draw");
    let top = bars.iter().map(|bar| bar.1).fold(0.0, f64::max).max(1e-9);
    draw(HEIGHT, |area| {
        let area = area.titled(title, ("sans-serif", 15))?;
        let (width, height) = area.dim_in_pixel();
        let (left, base, step) = (16, to_pixels(f64::from(height) - 28.0), f64::from(width - 32) / bars.len() as f64);
        for (index, (name, value)) in bars.iter().enumerate() {
            let begin = left + to_pixels(step * (index as f64 + 0.15));
            let end = left + to_pixels(step * (index as f64 + 0.85));
            let tall = to_pixels((f64::from(base) - 24.0) * value / top);
            area.draw(&Rectangle::new([(begin, base - tall), (end, base)], COLOURS[0].filled()))?;
            area.draw(&Text::new(figure(*value), (begin, base - tall - 16), ("sans-serif", 12)))?;
            area.draw(&Text::new(name.clone(), (begin, base + 6), ("sans-serif", 12)))?;
        }
        Ok(())
    })
}

/// Draws each range from its minimum to its maximum with a mark at the median, its figures beside it, an axis with ticks, and a
/// vertical line at `reference`. An outlier is cut, with an arrow.
///
/// # Errors
/// When the list is empty.
pub fn ranges(title: &str, reference: f64, ranges: &[Range]) -> anyhow::Result<String> {
    anyhow::ensure!(!ranges.is_empty(), "{title}: there is nothing to draw");
    let end = axis_end(reference, ranges);
    let height = RANGE * (u32::try_from(ranges.len())? + 2);
    draw(height, |area| {
        let area = area.titled(title, ("sans-serif", 15))?;
        let width = WIDTH.cast_signed() - NAMES - FIGURES;
        let at = |value: f64| NAMES + to_pixels(f64::from(width) * (value / end).min(1.0));
        let bottom = to_pixels(f64::from(RANGE) * ranges.len() as f64);
        let step = step(end);
        for number in 0..=to_pixels(end / step + 1e-9) {
            let value = step * f64::from(number);
            area.draw(&PathElement::new([(at(value), 0), (at(value), bottom + 4)], BLACK.mix(0.12)))?;
            area.draw(&Text::new(tick(value, end), (at(value) - 6, bottom + 6), ("sans-serif", 11)))?;
        }
        area.draw(&PathElement::new([(at(reference), 0), (at(reference), bottom)], BLACK.mix(0.4)))?;
        for (index, range) in ranges.iter().enumerate() {
            let y = to_pixels(f64::from(RANGE) * (index as f64 + 0.5));
            let Spread { min, median, max } = range.spread;
            let colour = if range.is_own { COLOURS[1] } else { COLOURS[0] };
            area.draw(&Text::new(range.name.clone(), (8, y - 7), ("sans-serif", 13).into_font().color(&colour)))?;
            area.draw(&PathElement::new([(at(min), y), (at(max), y)], colour.stroke_width(2)))?;
            if max > end {
                let tip = (at(end), y);
                area.draw(&PathElement::new([(tip.0 - 7, y - 4), tip, (tip.0 - 7, y + 4)], colour.stroke_width(2)))?;
            }
            if median <= end {
                area.draw(&Circle::new((at(median), y), 4, colour.filled()))?;
            }
            area.draw(&Text::new(range.spread.text(), (NAMES + width + 12, y - 7), ("sans-serif", 12)))?;
        }
        Ok(())
    })
}

/// The end of the axis: the highest figure that is no outlier, and some room.
fn axis_end(reference: f64, ranges: &[Range]) -> f64 {
    let mut ends: Vec<_> = ranges.iter().map(|range| range.spread.max).collect();
    ends.sort_unstable_by(f64::total_cmp);
    let limit = ends[(ends.len() - 1) / 2] * OUTLIER;
    ends.iter().copied().filter(|&end| end <= limit).fold(reference, f64::max).max(1e-9) * 1.05
}

/// The distance of ticks: 1, 2 or 5 times a power of ten, and at most eight of them.
fn step(end: f64) -> f64 {
    let power = 10.0_f64.powf((end / 8.0).log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|times| times * power).find(|step| end / step <= 8.0).unwrap_or(end)
}

/// A value at an axis that ends at `end`.
fn tick(value: f64, end: f64) -> String {
    match end {
        end if end >= 1e4 && value > 0.0 => figure(value),
        _ if (value - value.round()).abs() < 1e-9 => format!("{value:.0}"),
        end if end >= 0.8 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Puts several plots below each other in one SVG, with lines of text at its end.
pub fn stacked(plots: &[String], note: &str) -> String {
    let mut all = String::new();
    let mut top = 0;
    for plot in plots {
        // Each plot starts with its size, which sets its position.
        let height: u32 = attribute(plot, "height").unwrap_or(HEIGHT);
        all.push_str(&plot.replacen("<svg ", &format!("<svg y=\"{top}\" "), 1));
        top += height;
    }
    let lines = note.lines().count() as u32;
    let height = 16 * lines + 10;
    // Writing to a String cannot fail.
    let _ = writeln!(all, "<rect y=\"{top}\" width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>");
    for (line, text) in (1..).zip(note.lines()) {
        let (y, text) = (top + 16 * line, crate::table::escape(text));
        let _ = writeln!(all, "<text x=\"8\" y=\"{y}\" font-family=\"sans-serif\" font-size=\"11\">{text}</text>");
    }
    top += height;
    format!(
        "<svg width=\"{WIDTH}\" height=\"{top}\" viewBox=\"0 0 {WIDTH} {top}\" xmlns=\"http://www.w3.org/2000/svg\">\n{all}</svg>\n"
    )
}

fn attribute(svg: &str, name: &str) -> Option<u32> {
    svg.split_once(&format!("{name}=\""))?.1.split_once('"')?.0.parse().ok()
}

fn draw(height: u32, plot: impl FnOnce(&Area<'_>) -> anyhow::Result<()>) -> anyhow::Result<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        area.fill(&WHITE)?;
        plot(&area)?;
        area.present()?;
    }
    Ok(svg)
}

fn to_pixels(value: f64) -> i32 {
    value as i32
}

/// Formats a figure with three significant digits.
pub(crate) fn figure(value: f64) -> String {
    let size = value.abs();
    match size {
        _ if size == 0.0 => "0".to_owned(),
        _ if size >= 1e9 => format!("{:.2} G", value / 1e9),
        _ if size >= 1e6 => format!("{:.2} M", value / 1e6),
        _ if size >= 1e4 => format!("{:.1} k", value / 1e3),
        _ if size >= 100.0 => format!("{value:.0}"),
        _ if size >= 10.0 => format!("{value:.1}"),
        _ if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plots_contain_their_names_and_reject_empty_input() {
        let line = Line::new("fast", [(0.0, 1.0), (1.0, 2.0)]);
        let one = lines("speed", "seconds", &[line.clone(), Line::new("slow", [(0.0, 0.5), (1.0, 0.4)])]).unwrap();
        let two = bars("answers", &[("echo-1".to_owned(), 12.0)]).unwrap();
        let spread = Spread { min: 0.9, median: 1.1, max: 1.4 };
        let range = |name: &str, times: f64| Range {
            name: name.to_owned(),
            spread: Spread { min: spread.min * times, median: spread.median * times, max: spread.max * times },
            is_own: false,
        };
        let three = ranges("ratio", 1.0, &[range("off", 1.0), range("on", 1.1), range("far", 100.0)]).unwrap();
        let all = stacked(&[one, two, three], "today & here");
        for word in [
            "speed",
            "fast",
            "slow",
            "echo-1",
            "ratio",
            "off",
            "1.10 (0.90 to 1.40)",
            "110 (90 to 140)",
            "today &amp; here",
        ] {
            assert!(all.contains(word), "{word}");
        }
        assert_eq!(all.matches("<svg ").count(), 4);
        assert!(lines("speed", "seconds", &[]).is_err() && bars("answers", &[]).is_err());
    }

    #[test]
    fn an_outlier_does_not_set_the_axis_and_ticks_are_round() {
        let range = |max: f64| Range {
            name: String::new(),
            spread: Spread { min: max / 2.0, median: max / 1.5, max },
            is_own: false,
        };
        assert!((axis_end(0.0, &[range(1.0), range(1.2), range(50.0)]) - 1.26).abs() < 1e-9);
        assert!((axis_end(0.0, &[range(1.0), range(3.0)]) - 3.15).abs() < 1e-9);
        for (end, wanted) in [(1.0, 0.2), (8.0, 1.0), (100.0, 20.0), (0.3, 0.05)] {
            assert!((step(end) - wanted).abs() < 1e-9, "{end}: {}", step(end));
        }
        let ticks = [(1.0, 8.0), (0.2, 1.0), (0.05, 0.3), (12_345.0, 20_000.0), (0.0, 5.0)];
        assert_eq!(ticks.map(|(value, end)| tick(value, end)), ["1", "0.2", "0.05", "12.3 k", "0"]);
    }

    #[test]
    fn figures_have_three_significant_digits() {
        let figures = [0.0, 0.1234, 1.234, 12.34, 123.4, 12_345.0, 1.5e7, 2.5e10].map(figure);
        assert_eq!(figures, ["0", "0.123", "1.23", "12.3", "123", "12.3 k", "15.00 M", "25.00 G"]);
    }
}
