//! `--fail-if 'peak > 1.02'`: a bound on a ratio against the first report.

use super::side::{METRICS, Metric, Side};
use std::str::FromStr;

/// A metric, a comparison and a bound.
#[derive(Clone)]
pub(crate) struct Condition {
    text: String,
    metric: &'static Metric,
    holds: Comparison,
    bound: f64,
}

impl std::fmt::Debug for Condition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

/// Whether a ratio and a bound are so.
type Comparison = fn(f64, f64) -> bool;

/// Longer ones first, since they begin with shorter ones.
const COMPARISONS: [(&str, Comparison); 4] = [
    (">=", |ratio, bound| ratio >= bound),
    ("<=", |ratio, bound| ratio <= bound),
    (">", |ratio, bound| ratio > bound),
    ("<", |ratio, bound| ratio < bound),
];

impl FromStr for Condition {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = COMPARISONS.into_iter().find_map(|(sign, holds)| Some((text.split_once(sign)?, holds)));
        let ((name, bound), holds) = found.ok_or("write a metric, a comparison and a number, as in 'peak > 1.02'")?;
        let metric = METRICS.iter().find(|metric| metric.name == name.trim()).ok_or_else(|| {
            let names: Vec<_> = METRICS.iter().map(|metric| metric.name).collect();
            format!("`{}` is no metric; take one of {}", name.trim(), names.join(", "))
        })?;
        let bound = bound.trim().parse::<f64>().ok().filter(|bound| bound.is_finite());
        let bound = bound.ok_or("behind the comparison belongs a number, as in 'peak > 1.02'")?;
        Ok(Self { text: text.to_owned(), metric, holds, bound })
    }
}

impl Condition {
    /// A line for each report that meets it. A figure that is missing, or no number, breaks every bound.
    pub(crate) fn broken(&self, sides: &[Side]) -> Vec<String> {
        let words = |side: &Side| side.value(self.metric).map_or("-".to_owned(), self.metric.words);
        let line = |side: &Side| match side.ratio(self.metric, &sides[0]) {
            Some(ratio) if !(self.holds)(ratio, self.bound) && !ratio.is_nan() => None,
            Some(ratio) => Some(format!(
                "{}: {} is {ratio:.3} of the first ({} against {}), and '{}' fails",
                side.name,
                self.metric.title,
                words(side),
                words(&sides[0]),
                self.text
            )),
            None => Some(format!(
                "{}: {} is not in the report, so '{}' cannot hold",
                side.name, self.metric.title, self.text
            )),
        };
        sides.iter().skip(1).filter_map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::Condition;

    #[test]
    fn mistakes_say_what_to_write() {
        let mistake = |text: &str| text.parse::<Condition>().unwrap_err();
        assert!(mistake("peak").contains("'peak > 1.02'"));
        assert!(mistake("peek > 1").contains("`peek` is no metric; take one of peak, trajectory"));
        assert!(mistake("peak > much").contains("a number"));
        assert!(mistake("peak > NaN").contains("a number"));
        let condition: Condition = "time>=2".parse().unwrap();
        assert!((condition.holds)(2.0, condition.bound) && !(condition.holds)(1.9, condition.bound));
    }
}
