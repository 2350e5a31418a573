//! Peaks against the number of steps as an SVG: what is O(1) in steps is a flat line.

use super::side::{METRICS, Side};
use crate::failure::Result;
use crate::table::bytes;
use plotters::prelude::*;
use std::error::Error;

const SIZE: (u32, u32) = (760, 420);
const INK: RGBColor = RGBColor(0x33, 0x33, 0x33);
const COLOURS: [RGBColor; 6] = [
    RGBColor(0x2f, 0x6f, 0xd0),
    RGBColor(0xd1, 0x64, 0x2b),
    RGBColor(0x21, 0x86, 0x5a),
    RGBColor(0xa8, 0x43, 0x9c),
    RGBColor(0x9a, 0x7b, 0x0f),
    RGBColor(0x17, 0x80, 0x8f),
];

/// The reports that differ in their steps alone.
struct Curve {
    name: String,
    /// (steps, peak above baseline in bytes), by steps.
    points: Vec<(f64, f64)>,
}

/// Both axes are logarithmic.
pub(crate) fn peaks_against_steps(sides: &[Side]) -> Result<String> {
    let curves = curves(sides)?;
    let mut svg = String::new();
    // Drawing goes to memory: it fails for bugs alone.
    draw(&mut svg, &curves).map_err(|error| format!("the picture: {error}"))?;
    Ok(svg)
}

fn curves(sides: &[Side]) -> Result<Vec<Curve>> {
    let mut curves: Vec<Curve> = Vec::new();
    for side in sides {
        let steps = side.setting("steps").and_then(|steps| steps.parse::<f64>().ok());
        let steps = steps.ok_or_else(|| format!("{}: its settings do not say `steps`", side.name))?;
        let peak = side.value(&METRICS[0]).filter(|peak| *peak > 0.0);
        let peak = peak.ok_or_else(|| format!("{}: its peak is not above its baseline", side.name))?;
        let parts: Vec<_> = side.name.split(", ").filter(|part| !part.starts_with("steps ")).collect();
        let name = parts.join(", ");
        match curves.iter_mut().find(|curve| curve.name == name) {
            Some(curve) => curve.points.push((steps, peak)),
            None => curves.push(Curve { name, points: vec![(steps, peak)] }),
        }
    }
    curves.iter_mut().for_each(|curve| curve.points.sort_by(|a, b| a.0.total_cmp(&b.0)));
    Ok(curves)
}

fn draw(svg: &mut String, curves: &[Curve]) -> std::result::Result<(), Box<dyn Error>> {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let all = || curves.iter().flat_map(|curve| &curve.points);
    let ends = |values: &mut dyn Iterator<Item = f64>| {
        values.fold((f64::INFINITY, 0f64), |(least, most), value| (least.min(value), most.max(value)))
    };
    let (fewest, most) = ends(&mut all().map(|point| point.0));
    let (least, highest) = ends(&mut all().map(|point| point.1));
    let mut chart = ChartBuilder::on(&root)
        .margin(14)
        .caption("Peak heap above baseline against the number of steps", ("sans-serif", 18).into_font().color(&INK))
        .x_label_area_size(42)
        .y_label_area_size(80)
        .build_cartesian_2d(
            (fewest..most.max(fewest * 2.0)).log_scale().base(2.0),
            (least / 1.5..highest * 1.5).log_scale().base(2.0),
        )?;
    chart
        .configure_mesh()
        .max_light_lines(0)
        .bold_line_style(RGBColor(0xdd, 0xdd, 0xdd))
        .x_desc("steps")
        .x_label_formatter(&|steps| format!("{steps:.0}"))
        .y_label_formatter(&|peak| bytes(*peak as u64))
        .label_style(("sans-serif", 14).into_font().color(&INK))
        .draw()?;
    for (n, curve) in curves.iter().enumerate() {
        let colour = COLOURS[n % COLOURS.len()];
        let line = chart.draw_series(LineSeries::new(curve.points.iter().copied(), colour.stroke_width(2)))?;
        let name = if curve.name.is_empty() { "peak" } else { &curve.name };
        line.label(name).legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
        chart.draw_series(curve.points.iter().map(|point| Circle::new(*point, 4, colour.filled())))?;
    }
    let labels = ("sans-serif", 14).into_font().color(&INK);
    let position = SeriesLabelPosition::UpperLeft;
    chart.configure_series_labels().position(position).background_style(WHITE.mix(0.85)).label_font(labels).draw()?;
    root.present()?;
    Ok(())
}
