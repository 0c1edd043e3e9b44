//! The results, and their presentation.

use std::fmt;

/// The result of a measurement.
pub(crate) struct Figure {
    /// The measurements of the floor; empty if there is none.
    pub(crate) floor: Vec<f64>,
    pub(crate) runs: Vec<f64>,
    pub(crate) target: Target,
}

#[derive(Clone, Copy)]
pub(crate) enum Target {
    AtMost(f64),
    /// Minimum, relative to the floor.
    OfFloor(f64),
    /// Maximum, relative to the floor.
    TimesFloor(f64),
    /// Maximum, above the floor.
    AboveFloor(f64),
}

impl Figure {
    pub(crate) fn without_floor(runs: Vec<f64>, at_most: f64) -> Self {
        Self { floor: Vec::new(), runs, target: Target::AtMost(at_most) }
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (figure, shown) = summary(&self.runs);
        let (floor, shown_floor) = summary(&self.floor);
        let ratio = figure / floor;
        let (target, met) = match self.target {
            Target::AtMost(most) => (format!("<= {most}"), figure <= most),
            Target::OfFloor(part) => (format!(">= {part} x floor"), ratio >= part),
            Target::TimesFloor(most) => (format!("<= {most} x floor"), ratio <= most),
            Target::AboveFloor(most) => (format!("<= floor + {most}"), figure <= floor + most),
        };
        let shown_ratio =
            if self.floor.is_empty() { "-".to_owned() } else { format!("{ratio:.2}") };
        let verdict = if met { "met" } else { "MISSED" };
        write!(f, "{shown_floor:>25} {shown:>25} {shown_ratio:>5}  {target}: {verdict}")
    }
}

/// Returns the median, and its text with the range.
fn summary(runs: &[f64]) -> (f64, String) {
    let mut sorted = runs.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted[..] {
        [] => (f64::NAN, "-".to_owned()),
        [only] => (only, format!("{only:.4}")),
        [min, .., max] => {
            let median = sorted[sorted.len() / 2];
            let digits = if median < 100.0 { 3 } else { 0 };
            let shown = format!("{median:.digits$} ({min:.digits$} .. {max:.digits$})");
            (median, shown)
        }
    }
}
