//! Dropout whose mask is fixed for a solve: y = x · m / (1 − p), m drawn once.

use crate::Time;
use crate::error::OdeError;
use crate::field::Tangent;
use crate::field::draw::{Kept, Stream};
use candle_core::{Module, Result, Tensor};

/// Dropout that is a pure function of its input, as a vector field must be: each mask is drawn once from the layer's
/// [`Stream`] and kept, one per shape, dtype and device.
///
/// Built inside a solve (by the constructor of a model), its draws come from the solve's seed, the same ones in the
/// forward and the backward pass. On rows of a batch, in a field that is declared row-wise, give it a stream
/// [`by_row`](Stream::by_row).
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// let dropout = candle_ode::ops::Dropout::new(0.25)?;
/// let x = Tensor::ones(8, DType::F32, &Device::Cpu)?;
/// let y = dropout.forward(&x)?.to_vec1::<f32>()?;
/// assert!(y.iter().all(|&v| v == 0.0 || v == 1.0 / 0.75));
/// assert_eq!(y, dropout.forward(&x)?.to_vec1::<f32>()?);
/// # Ok::<(), candle_ode::OdeError>(())
/// ```
#[derive(Debug)]
pub struct Dropout {
    drop: f64,
    stream: Stream,
    masks: Kept,
}

impl Dropout {
    /// Zeroes each element with probability `drop`, with the next stream of the solve at hand.
    ///
    /// # Errors
    /// [`OdeError::Setting`] unless 0 ≤ `drop` < 1.
    pub fn new(drop: f64) -> crate::Result<Self> {
        Self::from_stream(drop, Stream::next())
    }

    /// Zeroes each element with probability `drop`, with a stream of one's own.
    ///
    /// # Errors
    /// [`OdeError::Setting`] unless 0 ≤ `drop` < 1.
    pub fn from_stream(drop: f64, stream: Stream) -> crate::Result<Self> {
        if (0.0..1.0).contains(&drop) {
            return Ok(Self { drop, stream, masks: Kept::default() });
        }
        let hint = "the probability of dropping an element must be at least 0 and less than 1";
        Err(OdeError::Setting { setting: "Dropout probability", value: drop.to_string(), hint })
    }

    fn mask(&self, x: &Tensor) -> Result<Tensor> {
        self.masks.like(x, || {
            let keep = 1.0 - self.drop;
            let ones = self.stream.bernoulli(keep, x.shape(), candle_core::DType::F32, x.device())?;
            (ones / keep)?.to_dtype(x.dtype())
        })
    }
}

impl Module for Dropout {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if self.drop == 0.0 { Ok(x.clone()) } else { x * self.mask(x)? }
    }
}

impl Tangent for Dropout {
    fn tangent(&self, _: &Time, y: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        Ok((self.forward(y)?, self.forward(v)?))
    }
}

#[cfg(test)]
mod tests {
    use super::super::gradcheck::{check, check_tangent, noise, values};
    use super::*;
    use crate::field::draw::seeded;
    use candle_core::{DType, Device};

    #[test]
    fn the_mask_is_fixed_and_scaled() {
        let dropout = Dropout::new(0.25).unwrap();
        let x = Tensor::ones((100, 100), DType::F64, &Device::Cpu).unwrap();
        let y = values(&dropout.forward(&x).unwrap());
        assert_eq!(y, values(&dropout.forward(&x).unwrap()));
        assert!((y.iter().sum::<f64>() / 1e4 - 1.0).abs() < 0.05);
        let half = dropout.forward(&x.to_dtype(DType::F16).unwrap()).unwrap();
        let same = y.iter().zip(values(&half)).all(|(&a, b)| (a == 0.0) == (b == 0.0));
        assert!(same && half.dtype() == DType::F16);
    }

    #[test]
    fn two_builds_of_one_solve_draw_the_same_and_two_layers_do_not() {
        let x = Tensor::ones(1000, DType::F32, &Device::Cpu).unwrap();
        let build = |seed| seeded(seed, || [Dropout::new(0.5).unwrap(), Dropout::new(0.5).unwrap()]);
        let run = |seed| build(seed).map(|layer| values(&layer.forward(&x).unwrap()));
        let [first, second] = run(7);
        assert_eq!([first.clone(), second.clone()], run(7));
        assert!(first != second && first != run(8)[0]);
    }

    #[test]
    fn gradients_and_tangents_are_masked() {
        let dropout = Dropout::from_stream(0.4, Stream::from_seed(3)).unwrap();
        check(&|args| dropout.forward(&args[0]), &[noise(&[5, 3], 1)]);
        check_tangent(&dropout, &|args| dropout.forward(&args[0]), &noise(&[5, 3], 1));
    }

    #[test]
    fn the_probability_is_checked() {
        for drop in [-0.1, 1.0, f64::NAN, f64::INFINITY] {
            assert!(matches!(Dropout::new(drop), Err(OdeError::Setting { .. })), "{drop}");
        }
        let x = noise(&[5], 1);
        assert_eq!(values(&Dropout::new(0.0).unwrap().forward(&x).unwrap()), values(&x));
    }

    #[test]
    fn it_is_send_and_sync() {
        fn both<T: Send + Sync>() {}
        both::<Dropout>();
        both::<super::super::Sequential>();
        both::<super::super::Mlp>();
    }
}
