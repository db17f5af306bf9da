//! Draws a soak as SVG: what may grow, over time.

use std::path::Path;

use plotters::prelude::*;

use crate::soak::Sample;

/// Width of the plot, and height of each of its parts, in pixels.
const WIDTH: u32 = 900;
const PART: u32 = 200;

/// One part of the plot: what it shows, and the figure of a sample.
type Part = (&'static str, fn(&Sample) -> f64);

const PARTS: [Part; 4] = [
    ("resident memory, MiB", |sample| sample.memory / f64::from(1 << 20)),
    ("open descriptors", |sample| sample.descriptors),
    ("tasks", |sample| sample.tasks),
    ("connections", |sample| sample.connections),
];

/// Draws the samples.
///
/// # Errors
/// When there are none, or the file cannot be written.
pub fn draw(samples: &[Sample], path: &Path) -> anyhow::Result<()> {
    let end = samples.last().map(|sample| sample.at.as_secs_f64()).unwrap_or_default();
    anyhow::ensure!(end > 0.0, "nothing was sampled: there is nothing to draw");
    let failed = |error: &dyn std::fmt::Display| anyhow::anyhow!("cannot write {}: {error}", path.display());
    let root = SVGBackend::new(path, (WIDTH, PART * PARTS.len() as u32)).into_drawing_area();
    root.fill(&WHITE).map_err(|error| failed(&error))?;
    for ((title, figure), area) in std::iter::zip(PARTS, root.split_evenly((PARTS.len(), 1))) {
        let highest = samples.iter().map(figure).fold(1.0, f64::max);
        let mut chart = ChartBuilder::on(&area)
            .caption(title, ("sans-serif", 15))
            .margin(8)
            .x_label_area_size(24)
            .y_label_area_size(56)
            .build_cartesian_2d(0.0..end, 0.0..highest * 1.1)
            .map_err(|error| failed(&error))?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .y_labels(5)
            .x_label_formatter(&|seconds| format!("{seconds:.0} s"))
            .draw()
            .map_err(|error| failed(&error))?;
        let line = samples.iter().map(|sample| (sample.at.as_secs_f64(), figure(sample)));
        chart.draw_series(LineSeries::new(line, &BLUE)).map_err(|error| failed(&error))?;
    }
    root.present().map_err(|error| failed(&error))
}
