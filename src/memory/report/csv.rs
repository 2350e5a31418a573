//! A report as tables of comma-separated values: one of the steps, one of the ledger.

use super::{MemoryReport, PassReport, StepReport};
use crate::account::Category;
use crate::memory::Part;
use std::fmt::{Display, Write};

/// The columns of the steps, in order.
const HEAD: &str = "pass,span,complete,index,t,h,duration_ns,live_before,live_after,peak,peak_above_baseline";

impl MemoryReport {
    /// Every step of every pass, a line each, with a head.
    ///
    /// `pass` and `span` tell the pass (`span` is its number, `complete` whether all of its steps are here), `index` is
    /// the step's, from 0 in forward direction, `t` and `h` are in model time, and bytes are the meter's. What is not
    /// known is left empty.
    pub fn csv(&self) -> String {
        let mut text = format!("{HEAD}\n");
        for pass in &self.passes {
            for step in &pass.steps {
                line(&mut text, self.baseline(), pass, step);
            }
        }
        text
    }

    /// The ledger, a line for each category and, under `trajectory/`, for each codec of the trajectory, with a head:
    /// bytes live at the end, the most at once, and at the moment of the peak.
    pub fn ledger_csv(&self) -> String {
        let mut text = "category,live,peak,at_peak\n".to_owned();
        // Writing to a string does not fail.
        let mut line = |name: &str, live: u64, peak: u64, at_peak: i64| {
            let _ = writeln!(text, "{},{live},{peak},{at_peak}", quoted(name));
        };
        for owned in &self.owned {
            let category = Category::from_name(&owned.category);
            let at_peak = category.map_or(0, |category| self.at_peak.bytes.of(Part::Owned(category)));
            line(&owned.category, owned.live, owned.peak, at_peak);
            for codec in self.trajectory.iter().filter(|_| category == Some(Category::Trajectory)) {
                line(&format!("trajectory/{}", codec.codec), codec.live, codec.peak, codec.at_peak);
            }
        }
        text
    }
}

fn line(text: &mut String, baseline: u64, pass: &PassReport, step: &StepReport) {
    let StepReport { index, t, h, peak, live_before, live_after, duration_ns } = *step;
    let above = i128::from(peak) - i128::from(baseline);
    let (index, t, h) = (known(index), known(t), known(h));
    let (name, span, complete) = (quoted(&pass.pass), pass.span, pass.complete);
    // Writing to a string does not fail.
    let _ = writeln!(
        text,
        "{name},{span},{complete},{index},{t},{h},{duration_ns},{live_before},{live_after},{peak},{above}"
    );
}

fn known(value: Option<impl Display>) -> String {
    value.map_or_else(String::new, |value| value.to_string())
}

/// A field with a comma, a quote or a line break in it is quoted.
fn quoted(field: &str) -> String {
    if field.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", field.replace('"', "\"\""))
    } else {
        field.to_owned()
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn only_what_needs_quotes_is_quoted() {
        assert_eq!(super::quoted("forward"), "forward");
        assert_eq!(super::quoted("a,\"b\""), "\"a,\"\"b\"\"\"");
    }
}
