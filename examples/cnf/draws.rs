//! Random numbers that depend on nothing but (seed, purpose, index): iteration 500 draws the same whether or not the
//! run was interrupted at 499.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// What numbers are drawn for; each purpose has its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Which points make a batch.
    Batch = 1,
    /// Noise on quantised data.
    Dequantise = 2,
    /// Which rows of a table are held out.
    Split = 3,
    /// The points the model is judged by.
    Validation = 4,
    /// First weights of the model.
    Weights = 5,
    /// Points of the base distribution that become samples.
    Samples = 6,
    /// The seed of a solve, from which Hutchinson's ε follows.
    Solve = 7,
}

/// The generator for that purpose, at that index (an iteration, or 0 where there is but one).
pub fn draws(seed: u64, purpose: Purpose, index: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&(purpose as u64).to_le_bytes());
    let mut rng = ChaCha8Rng::from_seed(key);
    rng.set_stream(index);
    rng
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::RngCore;

    #[test]
    fn every_key_has_its_own_numbers() {
        let first = |seed, purpose, index| draws(seed, purpose, index).next_u64();
        let base = first(1, Purpose::Batch, 1);
        assert_eq!(base, first(1, Purpose::Batch, 1));
        assert_ne!(base, first(2, Purpose::Batch, 1));
        assert_ne!(base, first(1, Purpose::Validation, 1));
        assert_ne!(base, first(1, Purpose::Batch, 2));
    }
}
