//! `loss.svg`: how the negative log-likelihood fell, one pair of curves per run.

use super::colour::curve;
use super::{Drawn, FAINT, INK, label, picture};
use candle_ode::Result;
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use std::path::Path;

/// One run: points (iteration, NLL in nats).
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    /// In the legend.
    pub name: String,
    /// On the batches.
    pub train: Vec<(u64, f64)>,
    /// On the validation points.
    pub val: Vec<(u64, f64)>,
}

const SIZE: (u32, u32) = (760, 400);
/// Points of a curve the eye can tell apart.
const POINTS: usize = 400;

/// Draws the curves: train thin, validation thick; the entropy of the data, if known, as a dashed line.
///
/// # Errors
/// [`candle_ode::OdeError::Io`] when the file cannot be written.
pub fn loss(path: &Path, title: &str, curves: &[Curve], entropy: Option<f64>) -> Result<()> {
    let last = curves.iter().flat_map(|curve| &curve.train).map(|(iteration, _)| *iteration).max().unwrap_or(1);
    let (low, high) = range(curves, entropy);
    picture(path, SIZE, |root| {
        let mut chart = ChartBuilder::on(root)
            .caption(title, label(18))
            .margin(14)
            .margin_right(24)
            .set_label_area_size(LabelAreaPosition::Left, 56)
            .set_label_area_size(LabelAreaPosition::Bottom, 42)
            .build_cartesian_2d(0f64..last as f64, low..high)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(FAINT)
            .axis_style(INK)
            .x_labels(9)
            .y_labels(7)
            .x_desc("iteration")
            .y_desc("negative log-likelihood / nats")
            .x_label_formatter(&|value| format!("{value:.0}"))
            .y_label_formatter(&|value| format!("{value:.2}"))
            .label_style(label(14))
            .axis_desc_style(label(15))
            .draw()?;
        let visible = |points: &[(u64, f64)]| -> Vec<(f64, f64)> {
            thinned(points)
                .into_iter()
                .filter(|(_, nll)| !nll.is_nan())
                .map(|(at, nll)| (at, nll.clamp(low, high)))
                .collect()
        };
        for (index, run) in curves.iter().enumerate() {
            chart.draw_series(LineSeries::new(visible(&run.train), curve(index).mix(0.3)))?;
        }
        for (index, run) in curves.iter().enumerate() {
            let style = curve(index).stroke_width(2);
            chart
                .draw_series(LineSeries::new(visible(&run.val), style))?
                .label(format!("{}, validation", run.name))
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], style));
            let style = curve(index).mix(0.4).stroke_width(1);
            chart
                .draw_series(std::iter::empty::<PathElement<(f64, f64)>>())?
                .label(format!("{}, batch", run.name))
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], style));
        }
        if let Some(entropy) = entropy {
            let line = [(0.0, entropy), (last as f64, entropy)];
            chart
                .draw_series(DashedLineSeries::new(line, 6, 4, INK.stroke_width(1)))?
                .label(format!("entropy of the data, {entropy:.2}"))
                .legend(|(x, y)| DashedPathElement::new([(x, y), (x + 22, y)], 6, 4, INK.stroke_width(1)));
        }
        legend(&mut chart)
    })
}

type Chart<'a> = ChartContext<
    'a,
    SVGBackend<'a>,
    Cartesian2d<plotters::coord::types::RangedCoordf64, plotters::coord::types::RangedCoordf64>,
>;

fn legend(chart: &mut Chart<'_>) -> Drawn {
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .margin(10)
        .legend_area_size(30)
        .background_style(WHITE.mix(0.85))
        .border_style(FAINT)
        .label_font(label(14))
        .draw()?;
    Ok(())
}

/// The range of NLL worth showing: everything but the first fall.
fn range(curves: &[Curve], entropy: Option<f64>) -> (f64, f64) {
    let points = curves.iter().flat_map(|curve| curve.train.iter().chain(&curve.val)).map(|&(_, nll)| nll);
    let mut values: Vec<f64> = points.filter(|nll| nll.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    let at = |share: f64| values.get((share * values.len() as f64) as usize).or(values.last()).copied();
    let low = at(0.0).unwrap_or(0.0).min(entropy.unwrap_or(f64::INFINITY));
    let high = at(0.97).unwrap_or(1.0).max(low);
    let pad = (0.06 * (high - low)).max(1e-3 * high.abs()).max(1e-3);
    (low - pad, high + pad)
}

/// At most [`POINTS`] points, each the mean of its neighbours.
fn thinned(points: &[(u64, f64)]) -> Vec<(f64, f64)> {
    let mean = |part: &[(u64, f64)]| {
        let count = part.len() as f64;
        part.iter().fold((0.0, 0.0), |(x, y), &(at, nll)| (x + at as f64 / count, y + nll / count))
    };
    points.chunks(points.len().div_ceil(POINTS).max(1)).map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_of_any_length_are_drawn() -> Result<()> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("loss.svg");
        let fall = |end: f64| (0..5000u64).map(|i| (i, end + 10.0 / (1.0 + i as f64))).collect::<Vec<_>>();
        let run = Curve { name: "f16".into(), train: fall(3.6), val: vec![(0, f64::NAN), (10, 4.0), (4999, 3.6)] };
        loss(&path, "checkerboard", &[run], Some(3.47))?;
        let svg = std::fs::read_to_string(&path).unwrap();
        for text in ["checkerboard", "iteration", "f16, validation", "f16, batch", "entropy of the data, 3.47"] {
            assert!(svg.lines().any(|line| line.trim() == text), "{text}");
        }
        assert!(svg.len() < 50_000, "{}", svg.len());
        let empty = Curve { name: "f32".into(), train: vec![], val: vec![] };
        loss(&path, "nothing yet", &[empty], None)
    }
}
