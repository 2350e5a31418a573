//! The digits of `examples/data`: 8×8 pixels and a class.

use candle_core::{DType, Device, Tensor, bail};
use candle_ode::Result;
use csv::ReaderBuilder;
use flate2::read::GzDecoder;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

const ROWS: &[u8] = include_bytes!("../data/digits.csv.gz");

/// Pixels along a side.
pub const SIDE: usize = 8;

/// Images and what they show.
pub struct Digits {
    pub training: Vec<Digit>,
    pub held_out: Vec<Digit>,
}

/// One image, row by row in [0, 1], and what it shows.
#[derive(Clone)]
pub struct Digit {
    pixels: Vec<f32>,
    class: u32,
}

impl Digits {
    /// All of them, a fifth held out.
    ///
    /// # Errors
    /// Rows that are not 64 pixels and a class.
    pub fn read(seed: u64) -> Result<Self> {
        let mut rows = ReaderBuilder::new().has_headers(false).from_reader(GzDecoder::new(ROWS));
        let mut digits = rows.deserialize().map(digit).collect::<candle_core::Result<Vec<_>>>()?;
        digits.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        let held_out = digits.split_off(digits.len() - digits.len() / 5);
        Ok(Self { training: digits, held_out })
    }
}

fn digit(row: csv::Result<Vec<f32>>) -> candle_core::Result<Digit> {
    let mut pixels = row.map_err(candle_core::Error::wrap)?;
    match pixels.pop() {
        Some(class) if pixels.len() == SIDE * SIDE => {
            pixels.iter_mut().for_each(|pixel| *pixel /= 16.0);
            Ok(Digit { pixels, class: class as u32 })
        }
        _ => bail!("a digit is a row of {} pixels and a class", SIDE * SIDE),
    }
}

/// Images `(batch, 1, 8, 8)` in F32 and their classes `(batch)`.
///
/// # Errors
/// When the device fails.
pub fn tensors(digits: &[Digit]) -> candle_core::Result<(Tensor, Tensor)> {
    let pixels: Vec<f32> = digits.iter().flat_map(|digit| &digit.pixels).copied().collect();
    let classes: Vec<u32> = digits.iter().map(|digit| digit.class).collect();
    let images = Tensor::from_vec(pixels, (digits.len(), 1, SIDE, SIDE), &Device::Cpu)?;
    Ok((images.to_dtype(DType::F32)?, Tensor::from_vec(classes, digits.len(), &Device::Cpu)?))
}
