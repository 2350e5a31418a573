//! What a finished run shows: `density.svg` and `loss.svg`.

use crate::data::Source;
use crate::metrics;
use crate::model::Flow;
use crate::plot::density::{Planar, Window, images, pairs, planar};
use crate::plot::loss::{Curve, loss};
use crate::train::Run;
use candle_ode::Result;
use std::path::Path;

/// Points in a scatter plot.
const POINTS: usize = 2000;
/// Cells of the heat map in each direction.
const CELLS: usize = 90;
/// Images of either kind.
const IMAGES: usize = 64;
/// A batch no training iteration sees.
const SHOWN: u64 = u64::MAX;

/// Draws data, samples and, in the plane, the density into `density.svg`.
///
/// # Errors
/// Those of the solves and of writing the file.
pub fn density(out: &Path, run: &Run) -> Result<()> {
    let (source, flow, path) = (run.source(), run.flow(), out.join("density.svg"));
    let (dim, seed) = (source.dim(), run.config().seed);
    let rows = if source.image_width().is_some() { IMAGES } else { POINTS };
    let mut data: Vec<f64> = source.batch(seed, SHOWN, rows).values.iter().map(|&v| f64::from(v)).collect();
    source.invert(&mut data);
    let mut samples = flow.samples(rows, seed)?;
    source.invert(&mut samples);
    if let Some(width) = source.image_width() {
        let rows = |values| -> Vec<&[f64]> { <[f64]>::chunks(values, dim).collect() };
        return images(&path, source.title(), width, source.white(), &rows(&data), &rows(&samples));
    }
    let pair = |values: &[f64]| -> Vec<[f64; 2]> {
        values.chunks(dim).map(|row| [row[0], row.get(1).copied().unwrap_or(0.0)]).collect()
    };
    let (data, samples) = (pair(&data), pair(&samples));
    let window = Window::around(&data);
    if dim != 2 {
        return pairs(&path, source.title(), window, &data, &samples);
    }
    let density = density_at(flow, source, &window.centres(CELLS))?;
    let caption = format!("density, {}", flow.precision());
    let (name, data, samples, density) = (source.title(), &data, &samples, &density);
    planar(&path, &Planar { name, caption: &caption, window, data, samples, density })
}

/// p of points in the data's coordinates.
fn density_at(flow: &Flow, source: &Source, points: &[[f64; 2]]) -> Result<Vec<f64>> {
    let mut values = points.concat();
    let log_det = source.apply(&mut values);
    let nll = flow.nll(&values.iter().map(|&v| v as f32).collect::<Vec<_>>())?;
    Ok(nll.iter().zip(log_det).map(|(nll, log_det)| (log_det - nll).exp()).collect())
}

/// Draws the metrics of runs, each given by its name and folder, into `loss.svg`.
///
/// # Errors
/// Those of reading the metrics and of writing the file.
pub fn losses(out: &Path, source: &Source, runs: &[(String, &Path)]) -> Result<()> {
    let curve = |(name, dir): &(String, &Path)| -> Result<Curve> {
        let rows = metrics::read(&dir.join("metrics.csv"))?;
        let train = rows.iter().map(|row| (row.iter, row.train_nll)).collect();
        let val = rows.iter().filter_map(|row| Some((row.iter, row.val_nll?))).collect();
        Ok(Curve { name: name.clone(), train, val })
    };
    let curves = runs.iter().map(curve).collect::<Result<Vec<_>>>()?;
    loss(&out.join("loss.svg"), source.title(), &curves, source.entropy())
}
