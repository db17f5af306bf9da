//! The spread of a measurement that was repeated.

use serde::Serialize;

/// A figure of a repeated measurement.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// The lowest figure.
    pub min: f64,
    /// The median.
    pub median: f64,
    /// The highest figure.
    pub max: f64,
}

impl Spread {
    /// Computes the spread of these figures. `None` if the list is empty.
    pub fn of(figures: &[f64]) -> Option<Self> {
        let mut sorted = figures.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median =
            if sorted.len() % 2 == 1 { sorted[middle] } else { f64::midpoint(sorted[middle - 1], sorted[middle]) };
        Some(Self { min, median, max })
    }

    /// Formats the spread as `median (lowest to highest)`. The median sets the number of digits.
    pub fn text(&self) -> String {
        let digits = match self.median.abs() {
            size if size >= 100.0 => 0,
            size if size >= 10.0 => 1,
            size if size >= 1.0 => 2,
            _ => 3,
        };
        format!("{:.digits$} ({:.digits$} to {:.digits$})", self.median, self.min, self.max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_takes_any_number_of_figures() {
        assert_eq!(Spread::of(&[]), None);
        assert_eq!(Spread::of(&[3.0, 1.0, 2.0]), Some(Spread { min: 1.0, median: 2.0, max: 3.0 }));
        assert_eq!(Spread::of(&[4.0, 1.0, 2.0, 3.0]).unwrap().text(), "2.50 (1.00 to 4.00)");
        assert_eq!(Spread::of(&[0.1234]).unwrap().text(), "0.123 (0.123 to 0.123)");
    }
}
