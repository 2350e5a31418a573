//! Curves and points over two logarithmic axes, as SVG.

use crate::failure::Result;
use plotters::prelude::*;
use std::path::Path;

/// One curve, or points with labels.
pub(super) struct Series {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
    pub(super) dashed: bool,
}

/// Draws `series` over logarithmic axes; each point of a series of one is a dot.
pub(super) fn log_log(path: &Path, title: &str, axes: [&str; 2], series: &[Series]) -> Result<()> {
    let mut svg = String::new();
    draw(&mut svg, title, axes, series).map_err(|error| format!("{}: {error}", path.display()))?;
    candle_ode::file::write_bytes_atomically(path, svg.as_bytes())?;
    crate::print(format!("{}\n", path.display()).as_bytes())
}

type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;

fn draw(svg: &mut String, title: &str, axes: [&str; 2], series: &[Series]) -> Drawn {
    let all = || series.iter().flat_map(|series| &series.points);
    let range = |of: &dyn Fn(&(f64, f64)) -> f64| {
        let low = all().map(of).fold(f64::INFINITY, f64::min);
        let high = all().map(of).fold(0.0, f64::max);
        low / 1.3..high * 1.3
    };
    let root = SVGBackend::with_string(svg, (890, 460)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 18))
        .margin(14)
        .margin_right(300)
        .set_label_area_size(LabelAreaPosition::Left, 64)
        .set_label_area_size(LabelAreaPosition::Bottom, 42)
        .build_cartesian_2d(range(&|p| p.0).log_scale(), range(&|p| p.1).log_scale())?;
    chart
        .configure_mesh()
        .x_desc(axes[0])
        .y_desc(axes[1])
        .y_label_formatter(&|value| format!("{value:.0e}"))
        .label_style(("sans-serif", 13))
        .draw()?;
    for (n, series) in series.iter().enumerate() {
        let colour = Palette99::pick(n).to_rgba();
        let points = series.points.iter().copied();
        match series.dashed {
            true => chart.draw_series(DashedLineSeries::new(points, 5, 4, colour.stroke_width(2)))?,
            false if series.points.len() > 1 => chart.draw_series(LineSeries::new(points, colour.stroke_width(2)))?,
            false => chart.draw_series(points.map(|point| Circle::new(point, 5, colour.filled())))?,
        };
        // Beside the chart, which would clip what its own legend draws there.
        let y = 24 + 16 * n as i32;
        root.draw(&Rectangle::new([(604, y - 2), (620, y + 2)], colour.filled()))?;
        root.draw(&Text::new(series.name.as_str(), (626, y - 6), ("sans-serif", 12)))?;
    }
    root.present()?;
    Ok(())
}
