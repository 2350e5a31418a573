//! `density.svg`: data, samples and learned density side by side.

use super::colour::magma;
use super::{Area, Drawn, INK, heading, label, picture};
use candle_ode::Result;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::path::Path;

/// A rectangle of the plane.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Window {
    /// From left to right.
    pub x: (f64, f64),
    /// From bottom to top.
    pub y: (f64, f64),
}

impl Window {
    /// The square window around 98 % of the points in each direction, with a margin; [-1, 1]² around nothing.
    pub fn around(points: &[[f64; 2]]) -> Self {
        let spread = |axis: usize| {
            let mut values: Vec<f64> = points.iter().map(|point| point[axis]).filter(|v| v.is_finite()).collect();
            values.sort_by(f64::total_cmp);
            let at = |share: f64| values.get((share * values.len() as f64) as usize).or(values.last()).copied();
            let (low, high) = (at(0.01).unwrap_or(-1.0), at(0.99).unwrap_or(1.0));
            let half = ((high - low) / 2.0 * 1.25).max(1e-6 * high.abs()).max(f64::MIN_POSITIVE);
            ((low + high) / 2.0, half)
        };
        let ((x, half_x), (y, half_y)) = (spread(0), spread(1));
        Self { x: (x - half_x, x + half_x), y: (y - half_y, y + half_y) }
    }

    /// Middles of `cells`² equal cells, row by row from the bottom.
    pub fn centres(&self, cells: usize) -> Vec<[f64; 2]> {
        let at = |(low, high): (f64, f64), cell: usize| low + (high - low) * (cell as f64 + 0.5) / cells as f64;
        (0..cells * cells).map(|index| [at(self.x, index % cells), at(self.y, index / cells)]).collect()
    }
}

/// What the picture of a planar flow shows.
#[derive(Clone, Copy, Debug)]
pub struct Planar<'a> {
    /// Above the left panel.
    pub name: &'a str,
    /// Above the right panel.
    pub caption: &'a str,
    /// What part of the plane.
    pub window: Window,
    /// Points of the data.
    pub data: &'a [[f64; 2]],
    /// Points of the model.
    pub samples: &'a [[f64; 2]],
    /// Density of the model at [`Window::centres`]; its length is a square.
    pub density: &'a [f64],
}

/// Sides of a panel and of the space around it, in pixels.
const PANEL: u32 = 360;
const LEFT: u32 = 44;
const GAP: u32 = 18;
const TOP: u32 = 36;
const BOTTOM: u32 = 28;
const BAR: u32 = 74;
/// Different colours in the heat map: neighbours of one colour are one cell of the file.
const SHADES: f64 = 48.0;

/// Draws the three panels with shared axes.
///
/// # Errors
/// [`candle_ode::OdeError::Io`] when the file cannot be written.
pub fn planar(path: &Path, shown: &Planar<'_>) -> Result<()> {
    let size = (LEFT + 3 * PANEL + 2 * GAP + BAR, TOP + PANEL + BOTTOM);
    picture(path, size, |root| {
        scatter(root, 0, &format!("{}: data", shown.name), shown.window, shown.data)?;
        scatter(root, 1, "samples", shown.window, shown.samples)?;
        heat(root, 2, shown)
    })
}

/// Draws data and samples of a flow in more dimensions, by two of their columns.
///
/// # Errors
/// [`candle_ode::OdeError::Io`] when the file cannot be written.
pub fn pairs(path: &Path, name: &str, window: Window, data: &[[f64; 2]], samples: &[[f64; 2]]) -> Result<()> {
    let size = (LEFT + 2 * PANEL + 2 * GAP, TOP + PANEL + BOTTOM);
    picture(path, size, |root| {
        scatter(root, 0, &format!("{name}: data"), window, data)?;
        scatter(root, 1, "samples", window, samples)
    })
}

/// Draws data and samples that are images, `width` pixels wide with values from 0 to `white`, 64 of each.
///
/// # Errors
/// [`candle_ode::OdeError::Io`] when the file cannot be written.
pub fn images(path: &Path, name: &str, width: usize, white: f64, data: &[&[f64]], samples: &[&[f64]]) -> Result<()> {
    let size = (2 * PANEL + 3 * GAP, TOP + PANEL + GAP);
    picture(path, size, |root| {
        for (panel, (title, rows)) in [(format!("{name}: data"), data), ("samples".into(), samples)].iter().enumerate()
        {
            let left = (GAP + panel as u32 * (PANEL + GAP)) as i32;
            heading(root, title, 18, (left + PANEL as i32 / 2, 12))?;
            for (index, image) in rows.iter().take(64).enumerate() {
                let cell = PANEL as i32 / 8;
                let pixel = (cell - 4) / width.max(1) as i32;
                let (x, y) = (left + index as i32 % 8 * cell, TOP as i32 + index as i32 / 8 * cell);
                for (place, value) in image.iter().enumerate() {
                    let (x, y) = (x + (place % width) as i32 * pixel, y + (place / width) as i32 * pixel);
                    let grey = (value / white * 32.0).round().clamp(0.0, 32.0) / 32.0;
                    let colour = magma(grey);
                    root.draw(&Rectangle::new([(x, y), (x + pixel, y + pixel)], colour.filled()))?;
                }
            }
        }
        Ok(())
    })
}

type Panel<'a> = ChartContext<
    'a,
    SVGBackend<'a>,
    Cartesian2d<plotters::coord::types::RangedCoordf64, plotters::coord::types::RangedCoordf64>,
>;

/// An empty dark panel with its title and axes; only the first has numbers on its y axis.
fn panel<'a>(
    root: &Area<'a>,
    index: u32,
    title: &str,
    window: Window,
) -> std::result::Result<Panel<'a>, Box<dyn std::error::Error>> {
    let left = LEFT + index * (PANEL + GAP);
    heading(root, title, 18, ((left + PANEL / 2) as i32, 12))?;
    let margin = if index == 0 { LEFT } else { 0 };
    let area = root.clone().shrink((left - margin, TOP), (margin + PANEL, PANEL + BOTTOM));
    let mut chart = ChartBuilder::on(&area)
        .set_label_area_size(LabelAreaPosition::Left, margin)
        .set_label_area_size(LabelAreaPosition::Bottom, BOTTOM)
        .build_cartesian_2d(window.x.0..window.x.1, window.y.0..window.y.1)?;
    let number = |value: &f64| format!("{}", (value * 1e6).round() / 1e6);
    let ticks = if index == 0 { 5 } else { 0 };
    chart
        .configure_mesh()
        .disable_mesh()
        .x_labels(5)
        .y_labels(ticks)
        .x_label_formatter(&number)
        .y_label_formatter(&number)
        .label_style(label(13))
        .axis_style(INK)
        .draw()?;
    chart.plotting_area().fill(&magma(0.0))?;
    Ok(chart)
}

fn scatter(root: &Area<'_>, index: u32, title: &str, window: Window, points: &[[f64; 2]]) -> Drawn {
    let chart = panel(root, index, title, window)?;
    let inside = |(low, high): (f64, f64), value: f64| low <= value && value <= high;
    let colour = magma(0.9).mix(0.75);
    for &[x, y] in points.iter().filter(|[x, y]| inside(window.x, *x) && inside(window.y, *y)) {
        chart.plotting_area().draw(&Circle::new((x, y), 1, colour.filled()))?;
    }
    Ok(())
}

fn heat(root: &Area<'_>, index: u32, shown: &Planar<'_>) -> Drawn {
    let chart = panel(root, index, shown.caption, shown.window)?;
    let top = ceiling(shown.density);
    let shade = |density: f64| (density / top).clamp(0.0, 1.0) * SHADES;
    let cells = shown.density.len().isqrt();
    let Window { x, y } = shown.window;
    let edge = |(low, high): (f64, f64), cell: usize| low + (high - low) * cell as f64 / cells as f64;
    for (row, densities) in shown.density.chunks_exact(cells.max(1)).enumerate() {
        let shades: Vec<u8> = densities.iter().map(|&density| shade(density).round() as u8).collect();
        let mut start = 0;
        for run in shades.chunk_by(|a, b| a == b) {
            let end = start + run.len();
            if run[0] > 0 {
                let corners = [(edge(x, start), edge(y, row + 1)), (edge(x, end), edge(y, row))];
                let colour = magma(f64::from(run[0]) / SHADES);
                chart.plotting_area().draw(&Rectangle::new(corners, colour.filled()))?;
            }
            start = end;
        }
    }
    bar(root, (LEFT + 3 * PANEL + 3 * GAP) as i32, top)
}

/// The colour bar, with what its ends stand for.
fn bar(root: &Area<'_>, left: i32, top: f64) -> Drawn {
    let (height, above) = (PANEL as i32, TOP as i32);
    let steps = SHADES as i32;
    for step in 0..steps {
        let level = |step: i32| above + height - height * step / steps;
        let colour = magma(f64::from(step) / f64::from(steps - 1));
        root.draw(&Rectangle::new([(left, level(step + 1)), (left + 12, level(step))], colour.filled()))?;
    }
    let style = label(13);
    let digits = (1.0 - top.log10().floor()).clamp(0.0, 12.0) as usize;
    for (text, share) in
        [("0".to_owned(), 0.0), (format!("{:.digits$}", top / 2.0), 0.5), (format!("{top:.digits$}"), 1.0)]
    {
        let at = above + height - (f64::from(height) * share) as i32;
        let anchor = Pos::new(
            HPos::Left,
            if share == 1.0 {
                VPos::Top
            } else if share == 0.0 {
                VPos::Bottom
            } else {
                VPos::Center
            },
        );
        root.draw_text(&text, &style.pos(anchor), (left + 17, at))?;
    }
    Ok(())
}

/// The density that is shown lightest: a few peaks must not darken the rest.
fn ceiling(density: &[f64]) -> f64 {
    let mut sorted: Vec<f64> = density.iter().copied().filter(|v| v.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    let top = sorted.get(sorted.len() * 995 / 1000).or(sorted.last()).copied().unwrap_or(1.0);
    if top > 0.0 { top } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn picture_is_text_and_cells() -> Result<()> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("density.svg");
        let window = Window { x: (-4.0, 4.0), y: (-4.0, 4.0) };
        let density: Vec<f64> = window.centres(50).iter().map(|[x, y]| (-(x * x + y * y) / 2.0).exp()).collect();
        let points = [[0.0, 1.0], [2.0, f64::NAN], [9.0, 0.0]];
        let shown =
            Planar { name: "disc", caption: "density", window, data: &points, samples: &points, density: &density };
        planar(&path, &shown)?;
        let svg = std::fs::read_to_string(&path).unwrap();
        for text in ["disc: data", "samples", "density", "-4"] {
            assert!(svg.lines().any(|line| line.trim() == text), "{text}");
        }
        assert_eq!(svg.matches("<circle").count(), 2, "points outside are left out");
        assert!(svg.matches("<rect").count() > 100);
        planar(&path, &Planar { density: &[], data: &[], samples: &[], ..shown })?;
        pairs(&path, "disc", Window::around(&[]), &[], &points)?;
        images(&path, "digits", 8, 16.0, &[&[4.0; 64]], &[])
    }

    #[test]
    fn window_covers_the_points_but_not_the_outliers() {
        let mut points: Vec<_> = (0..1000).map(|i| [f64::from(i) / 1000.0, 5.0]).collect();
        points.push([1e6, 5.0]);
        let Window { x, y } = Window::around(&points);
        assert!(x.0 < 0.0 && x.0 > -0.5 && x.1 > 1.0 && x.1 < 1.5);
        assert!(y.0 < 5.0 && y.1 > 5.0);
        assert_eq!(
            Window { x: (0.0, 2.0), y: (0.0, 2.0) }.centres(2),
            [[0.5, 0.5], [1.5, 0.5], [0.5, 1.5], [1.5, 1.5]]
        );
    }
}
