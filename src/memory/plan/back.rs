//! The walk back over what was kept of a tile, in bytes.

use super::ghost::Ghost;
use super::slots::{AtHand, Slots};
use super::step::Held;
use super::walk::{Consume, Solve, Walked};
use crate::error::Result;
use crate::memory::composition::Part;
use crate::memory::meter::held;
use crate::trajectory::schedule::{Action, Schedule, Slot};
use std::rc::Rc;

/// What a backward pass leaves behind: dL/dy0, and a table of times.
pub(super) type Left = (Option<Ghost>, Option<Held>);

impl Solve<'_> {
    /// The backward pass over what a schedule has kept, for one cotangent of each of the outputs.
    pub(super) fn backward(
        &mut self,
        walked: &mut Walked,
        outputs: &[usize],
        (schedule, consume): (&dyn Schedule, Consume),
    ) -> Result<Left> {
        let cotangents = self.cotangents(outputs);
        let model = self.open(true);
        let mut slots = if consume { std::mem::take(&mut walked.slots) } else { walked.slots.share() };
        let states = slots.states();
        // Steps after the last output that the loss uses cost nothing.
        let steps = outputs.last().copied().unwrap_or(0);
        let kept: Vec<usize> = walked.scheduled.iter().copied().filter(|n| *n < steps && states.contains(n)).collect();
        let with_stages = schedule.slot() == Slot::Stages;
        let last = if with_stages { steps.max(1) } else { steps.saturating_sub(1) };
        let mut linearized = if with_stages && steps > 0 { slots.linearized(last) } else { None };
        let is_at_last =
            steps > 0 && (last == 0 || if with_stages { linearized.is_some() } else { states.contains(&last) });
        let mut at_hand = if is_at_last && !with_stages { self.restore(walked, &mut slots, last) } else { None };
        if !kept.contains(&last) {
            slots.drop_state(self, last);
        }
        let mut lambda: Option<Held> = None;
        let actions = || schedule.reversal(&kept, steps, is_at_last);
        // What is to be done, and the states that are held and scheduled, in both passes.
        let (_, to_do) = held(|| Ok(actions().count()))?;
        let numbers = walked.scheduled.len() + kept.len() + states.len();
        let lists = self.heap.buffer(Part::Other, to_do.most + size_of::<usize>() * numbers);
        let mut actions = actions().peekable();
        while let Some(action) = actions.next() {
            match action {
                Action::Advance { from, to } => {
                    let Some(mut y) = at_hand.take().map(|at_hand: AtHand| at_hand.state(self)) else { continue };
                    for n in from..to {
                        let keep = n + 1 == to && actions.peek() == Some(&Action::Keep(to));
                        self.counts.recomputed_steps += 1;
                        let after = match with_stages && n + 1 == to {
                            true => {
                                let (after, made) = self.linearized_step();
                                let made = Rc::new(made);
                                if keep {
                                    slots.keep_linearized(to, made.clone());
                                }
                                linearized = Some(made);
                                after
                            }
                            false => self.step(),
                        };
                        y = slots.reach(self, n + 1, after, keep);
                    }
                    at_hand = Some(AtHand::State(y));
                }
                Action::Keep(_) => {}
                Action::Restore(n) => {
                    at_hand = self.restore(walked, &mut slots, n);
                    linearized = slots.linearized(n);
                }
                Action::Drop(n) => slots.drop_state(self, n),
                Action::Reverse(n) => {
                    if let Some(at) = outputs.iter().position(|output| *output == n + 1) {
                        lambda = Some(self.with_cotangent(lambda.as_ref(), &cotangents[at]));
                    }
                    // What the step starts from is let go after the new λ is told of.
                    let mut from = None;
                    let pulled = match (linearized.take(), at_hand.take()) {
                        (Some(all), y) => {
                            drop(y);
                            self.pullback_linearized(&all)
                        }
                        // A state at hand is given away, unless the step may be tried again.
                        (None, Some(AtHand::State(start))) => {
                            let _again = self.tries_again.then(|| start.clone());
                            self.pullback(start)
                        }
                        (None, Some(kept)) => {
                            let start = from.insert(kept).state(self);
                            self.pullback(start)
                        }
                        (None, None) => continue,
                    };
                    self.settle();
                    lambda = Some(self.cotangent(pulled));
                }
            }
        }
        if let Some(at) = outputs.iter().position(|output| *output == 0) {
            lambda = Some(self.with_cotangent(lambda.as_ref(), &cotangents[at]));
        }
        drop((lists, slots));
        Ok((self.hand_over(model, lambda.map(|(lambda, _)| lambda)), None))
    }

    /// Handles to the cotangents of the outputs, which are Candle's.
    pub(super) fn cotangents(&self, outputs: &[usize]) -> Vec<Ghost> {
        outputs.iter().map(|_| self.heap.handle(Part::Outside)).collect()
    }

    /// λ with the cotangent of an output.
    pub(super) fn with_cotangent(&self, lambda: Option<&Held>, cotangent: &Ghost) -> Held {
        let sum = if lambda.is_some() { self.state() } else { cotangent.clone() };
        self.cotangent(sum)
    }

    /// The model is closed; dL/dy0 and the sums are handed over.
    pub(super) fn hand_over(&mut self, model: Ghost, of_start: Option<Ghost>) -> Option<Ghost> {
        self.close(model);
        self.sums = None;
        of_start
    }

    fn restore(&self, walked: &Walked, slots: &mut Slots, n: usize) -> Option<AtHand> {
        if n == 0 { Some(AtHand::State(walked.start.clone())) } else { slots.restore(self, n) }
    }
}
