//! What the flow is fitted to: a toy density, the digits, or the rows of a file.

pub mod npy;
pub mod table;
pub mod toy;
pub mod transform;

use crate::draws::{Purpose, draws};
use candle_ode::{OdeError, Result};
use flate2::read::GzDecoder;
use rand::Rng;
use rand::seq::SliceRandom;
use std::fs::{self, File};
use std::io::{self, BufReader};
use std::path::Path;
use table::Matrix;
use toy::Toy;
use transform::Transform;

/// Points in the model's coordinates.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// Row after row, (rows, dim).
    pub values: Vec<f32>,
    /// Columns.
    pub dim: usize,
    /// Mean over the rows of log|det dz/dx|: NLL in the data's coordinates = NLL in the model's − this.
    pub log_det: f64,
}

impl Batch {
    /// How many points.
    pub fn len(&self) -> usize {
        self.values.len() / self.dim
    }
}

/// Where points come from.
#[derive(Clone, Debug)]
pub struct Source {
    name: String,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    Toy(Toy),
    Table(Box<Table>),
}

/// The rows of a file, split once and for all.
#[derive(Clone, Debug)]
struct Table {
    train: Matrix,
    held_out: Matrix,
    /// Whole numbers 0..levels, to which uniform noise in [0, 1) is added.
    levels: Option<u8>,
    transform: Transform,
}

/// The digits of `examples/data`, 8×8 pixels of 17 levels.
const DIGITS: &[u8] = include_bytes!("../data/digits.csv.gz");
const PIXELS: usize = 64;
const LEVELS: u8 = 17;

/// Splits, validation points and their noise do not depend on the seed of a run, so that runs are judged by the same.
const JUDGE: u64 = 20_251_023;

impl Source {
    /// Opens a toy density by name, `digits`, or a `.csv`, `.csv.gz`, `.npy` or `.npz` file by path.
    ///
    /// # Errors
    /// [`OdeError::Io`] and [`OdeError::Format`] for files, the latter with line and column;
    /// [`OdeError::Setting`] for something that is neither a name nor such a path.
    pub fn open(data: &str) -> Result<Self> {
        let kind = match (Toy::from_name(data), data) {
            (Some(toy), _) => Kind::Toy(toy),
            (None, "digits") => {
                let pixels = table::read_csv(GzDecoder::new(DIGITS)).map(|rows| rows.first_columns(PIXELS));
                let table = pixels.and_then(|rows| Table::split(&rows, Some(LEVELS)));
                Kind::Table(Box::new(table.map_err(|reason| format(Path::new("digits.csv.gz"), reason))?))
            }
            (None, path) => {
                let path = Path::new(path);
                let rows = read(path)?;
                Kind::Table(Box::new(Table::split(&rows, None).map_err(|reason| format(path, reason))?))
            }
        };
        Ok(Self { name: data.to_owned(), kind })
    }

    /// The file's or density's name without folders and endings, for titles.
    pub fn title(&self) -> &str {
        let name = Path::new(&self.name).file_name().and_then(|name| name.to_str()).unwrap_or(&self.name);
        name.split_once('.').map_or(name, |(stem, _)| stem)
    }

    /// Columns.
    pub fn dim(&self) -> usize {
        match &self.kind {
            Kind::Toy(_) => 2,
            Kind::Table(table) => table.train.columns(),
        }
    }

    /// The lowest NLL there is, in nats, if known.
    pub fn entropy(&self) -> Option<f64> {
        match &self.kind {
            Kind::Toy(toy) => toy.entropy(),
            Kind::Table(_) => None,
        }
    }

    /// Width of the images the rows are, if they are.
    pub fn image_width(&self) -> Option<usize> {
        match &self.kind {
            Kind::Table(table) if table.levels.is_some() => Some(8),
            _ => None,
        }
    }

    /// The value of a white pixel; 1 for what is no image.
    pub fn white(&self) -> f64 {
        match &self.kind {
            Kind::Table(table) => table.levels.map_or(1.0, |levels| f64::from(levels - 1)),
            Kind::Toy(_) => 1.0,
        }
    }

    /// The batch of that iteration: `rows` fresh points, or rows of the file drawn with replacement.
    pub fn batch(&self, seed: u64, iteration: u64, rows: usize) -> Batch {
        let mut rng = draws(seed, Purpose::Batch, iteration);
        match &self.kind {
            Kind::Toy(toy) => toy_batch(*toy, &mut rng, rows),
            Kind::Table(table) => {
                let noise = draws(seed, Purpose::Dequantise, iteration);
                let picked = (0..rows).map(|_| table.train.row(rng.random_range(0..table.train.len())));
                table.batch(picked, noise)
            }
        }
    }

    /// The points every run is judged by: `rows` of a toy density, or all rows held out.
    pub fn validation(&self, rows: usize) -> Batch {
        match &self.kind {
            Kind::Toy(toy) => toy_batch(*toy, &mut draws(JUDGE, Purpose::Validation, 0), rows),
            Kind::Table(table) => table.batch(table.held_out.rows(), draws(JUDGE, Purpose::Dequantise, 0)),
        }
    }

    /// From the model's coordinates to the data's, in place; `values` is (rows, dim).
    pub fn invert(&self, values: &mut [f64]) {
        if let Kind::Table(table) = &self.kind {
            values.chunks_exact_mut(self.dim()).for_each(|row| table.transform.invert(row));
        }
    }

    /// From the data's coordinates to the model's, in place, with log|det dz/dx| of each row; `values` is (rows, dim).
    pub fn apply(&self, values: &mut [f64]) -> Vec<f64> {
        let rows = values.chunks_exact_mut(self.dim());
        match &self.kind {
            Kind::Toy(_) => rows.map(|_| 0.0).collect(),
            Kind::Table(table) => rows.map(|row| table.transform.apply(row)).collect(),
        }
    }
}

impl Table {
    fn split(rows: &Matrix, levels: Option<u8>) -> std::result::Result<Self, String> {
        if rows.len() < 20 {
            return Err(format!("{} rows are too few: 20 at least, of which a tenth is held out", rows.len()));
        }
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.shuffle(&mut draws(JUDGE, Purpose::Split, 0));
        let (held_out, train) = order.split_at(rows.len() / 10);
        let pick = |indices: &[usize]| {
            Matrix::new(indices.iter().flat_map(|&index| rows.row(index)).copied().collect(), rows.columns())
        };
        let (train, held_out) = (pick(train), pick(held_out));
        let mut noise = draws(JUDGE, Purpose::Dequantise, 1);
        let smooth = dequantised(train.rows(), levels, &mut noise);
        let transform =
            Transform::fit(&Matrix::new(smooth, rows.columns()), levels.map(f64::from)).map_err(|column| {
                let (number, value) = (column + 1, rows.row(0)[column]);
                format!("column {number} is {value} in every row: drop it, it has no density")
            })?;
        Ok(Self { train, held_out, levels, transform })
    }

    fn batch<'a>(&self, rows: impl Iterator<Item = &'a [f64]>, mut noise: impl Rng) -> Batch {
        let dim = self.train.columns();
        let mut values = dequantised(rows, self.levels, &mut noise);
        let log_det: f64 = values.chunks_exact_mut(dim).map(|row| self.transform.apply(row)).sum();
        let count = (values.len() / dim).max(1) as f64;
        Batch { values: values.into_iter().map(|v| v as f32).collect(), dim, log_det: log_det / count }
    }
}

fn dequantised<'a>(rows: impl Iterator<Item = &'a [f64]>, levels: Option<u8>, noise: &mut impl Rng) -> Vec<f64> {
    let mut values: Vec<f64> = rows.flatten().copied().collect();
    if levels.is_some() {
        values.iter_mut().for_each(|value| *value += noise.random::<f64>());
    }
    values
}

fn toy_batch(toy: Toy, rng: &mut impl Rng, rows: usize) -> Batch {
    Batch { values: (0..rows).flat_map(|_| toy.point(rng)).map(|v| v as f32).collect(), dim: 2, log_det: 0.0 }
}

fn read(path: &Path) -> Result<Matrix> {
    let io = |source: io::Error| OdeError::Io { path: path.to_owned(), source };
    let name = path.to_string_lossy();
    let rows = if name.ends_with(".csv") {
        table::read_csv(File::open(path).map_err(io)?)
    } else if name.ends_with(".csv.gz") {
        table::read_csv(GzDecoder::new(File::open(path).map_err(io)?))
    } else if name.ends_with(".npy") {
        npy::read_npy(&fs::read(path).map_err(io)?)
    } else if name.ends_with(".npz") {
        npy::read_npz(BufReader::new(File::open(path).map_err(io)?))
    } else {
        return Err(OdeError::Setting {
            setting: "--data",
            value: name.into_owned(),
            hint: "give checkerboard, 8gaussians, 2spirals, pinwheel, moons, circles, swissroll, rings, digits, \
                   or a path that ends in .csv, .npy or .npz",
        });
    };
    rows.map_err(|reason| format(path, reason))
}

fn format(path: &Path, reason: String) -> OdeError {
    OdeError::Format { path: path.to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_depend_on_seed_and_iteration_alone() -> Result<()> {
        for name in ["checkerboard", "digits"] {
            let (first, second) = (Source::open(name)?, Source::open(name)?);
            first.batch(3, 1, 8);
            assert_eq!(first.batch(3, 500, 8), second.batch(3, 500, 8));
            assert_ne!(first.batch(3, 500, 8), first.batch(3, 501, 8));
            assert_ne!(first.batch(3, 500, 8), first.batch(4, 500, 8));
            assert_eq!(first.validation(50), second.validation(50));
        }
        Ok(())
    }

    #[test]
    fn digits_are_sixty_four_standardised_columns() -> Result<()> {
        let digits = Source::open("digits")?;
        let held_out = digits.validation(0);
        assert_eq!((digits.dim(), held_out.len()), (64, 179));
        let batch = digits.batch(0, 0, 4096);
        let mean = batch.values.iter().sum::<f32>() / batch.values.len() as f32;
        let square = batch.values.iter().map(|v| v * v).sum::<f32>() / batch.values.len() as f32;
        assert!(mean.abs() < 0.02 && (square - 1.0).abs() < 0.05, "{mean}, {square}");
        let mut pixels: Vec<f64> = batch.values.iter().map(|&v| f64::from(v)).collect();
        digits.invert(&mut pixels);
        assert!(pixels.iter().all(|pixel| (-1e-4..17.0001).contains(pixel)));
        Ok(())
    }

    #[test]
    fn files_are_found_by_their_ending_and_errors_name_them() -> Result<()> {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let rows: String = (0..40).map(|i| format!("{i},{},{}\n", i * i, (i * 7) % 11)).collect();
        fs::write(path("good.csv"), format!("a,b,c\n{rows}")).unwrap();
        let source = Source::open(&path("good.csv"))?;
        assert_eq!((source.dim(), source.title(), source.validation(0).len()), (3, "good", 4));
        assert!(source.batch(0, 0, 5).log_det < 0.0);

        let error = |name: &str, content: &str| {
            fs::write(path(name), content).unwrap();
            Source::open(&path(name)).unwrap_err().to_string()
        };
        let bad = error("bad.csv", &format!("{rows}1,two,3\n"));
        assert!(bad.contains("bad.csv: line 41, column 2"), "{bad}");
        assert!(error("few.csv", "1,2\n3,4\n").contains("2 rows are too few"));
        let constant: String = (0..40).map(|i| format!("{i},5\n")).collect();
        assert!(error("constant.csv", &constant).contains("column 2 is 5 in every row"));
        assert!(error("array.npy", "1,2").contains("no npy file"));
        assert!(error("array.npz", "1,2").contains("no npz archive"));
        assert!(error("packed.csv.gz", "1,2").contains("packed.csv.gz: "));
        assert!(matches!(Source::open(&path("missing.csv")), Err(OdeError::Io { .. })));
        assert!(matches!(Source::open("chessboard"), Err(OdeError::Setting { .. })));
        Ok(())
    }
}
