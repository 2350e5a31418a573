//! The law of a controller: by which factor the next step is longer, from the errors of the last three.

use super::Controller;

/// The scaled errors of the last accepted steps, newest first; 1 where there was none.
#[derive(Clone, Debug)]
pub(crate) struct Memory([f64; 2]);

/// Errors below are as good as this: no factor is unbounded.
const LEAST_ERROR: f64 = 1e-10;

impl Memory {
    pub(crate) fn new() -> Self {
        Self([1.0; 2])
    }

    /// The factor after a step that was accepted with `error`; `k` is the order of the estimate plus one.
    pub(crate) fn accepted(&self, controller: &Controller, k: f64, error: f64) -> f64 {
        let errors = [error.max(LEAST_ERROR), self.0[0], self.0[1]];
        let law: f64 = errors.iter().zip(controller.betas).map(|(e, beta)| e.powf(-beta / k)).product();
        (controller.safety * law).clamp(controller.least_factor, controller.most_factor)
    }

    /// Remembers the error of an accepted step.
    pub(crate) fn remember(&mut self, error: f64) {
        self.0 = [error.max(LEAST_ERROR), self.0[0]];
    }

    /// The factor after a step that was rejected with `error`, which may be NaN: the past does not count.
    pub(crate) fn rejected(controller: &Controller, k: f64, error: f64) -> f64 {
        if !error.is_finite() {
            return controller.least_factor;
        }
        (controller.safety * error.powf(-1.0 / k)).clamp(controller.least_factor, 0.95)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_the_tolerance_a_steady_step_shrinks_by_the_safety_alone() {
        for controller in [Controller::i(), Controller::pi(), Controller::pid()] {
            assert_eq!(Memory::new().accepted(&controller, 5.0, 1.0), 0.9);
        }
    }

    #[test]
    fn the_step_settles_where_its_error_is_the_tolerance() {
        // e = c·hᵏ exactly: the deadbeat law gets there in one step, the others in some.
        for (controller, steps) in [(Controller::i(), 1), (Controller::pi(), 30), (Controller::pid(), 120)] {
            let (controller, k) = (controller.safety(1.0), 4.0);
            let (mut h, mut memory) = (0.05, Memory::new());
            for _ in 0..steps {
                let error = 16.0 * f64::powf(h, k);
                h *= memory.accepted(&controller, k, error);
                memory.remember(error);
            }
            assert!((h - 0.5).abs() < 1e-3, "{:?} settles at {h}", controller.betas);
        }
    }

    #[test]
    fn a_rejected_step_becomes_shorter_whatever_its_error() {
        for error in [1.0 + 1e-12, 2.0, 1e30, f64::INFINITY, f64::NAN] {
            let factor = Memory::rejected(&Controller::pi(), 5.0, error);
            assert!((0.2..=0.95).contains(&factor), "{error}: {factor}");
        }
        assert_eq!(Memory::rejected(&Controller::pi(), 5.0, f64::NAN), 0.2);
    }
}
