//! What was measured, and how it is shown.

use std::fmt;

/// What was measured.
pub(crate) struct Figure {
    /// Empty if there is no floor.
    pub(crate) floor: Vec<f64>,
    pub(crate) runs: Vec<f64>,
    pub(crate) target: Target,
}

#[derive(Clone, Copy)]
pub(crate) enum Target {
    AtMost(f64),
    /// At least so much of the floor.
    OfFloor(f64),
    /// At most so many times the floor.
    TimesFloor(f64),
    /// At most so much above the floor.
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

/// The median, and how it is shown.
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
