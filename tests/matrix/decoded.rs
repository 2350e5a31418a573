//! A solve by the actions of its schedule and the public face of its codec, and the pullback of each of its steps
//! through Candle's own graph from the state that was decoded for it.

use super::*;
use candle_core::Var;
use candle_ode::schedule::{Action, Schedule, Slot};
use candle_ode::{Codec, Encodes};

/// Where each step is pulled back from, and what is handed out at the end.
pub struct Decoded<'a> {
    /// Steps of the solve, without their lengths and an adjoint; in F64.
    pub ode: Ode,
    pub codec: &'a dyn Codec,
    pub schedule: &'a dyn Schedule,
    /// Whether the forward pass knew how many steps there would be.
    pub known: bool,
    /// Their ends, the start included.
    pub times: &'a [f64],
}

/// A state that is kept; an increment, which ends at the state above, is decoded to the state itself.
struct Kept {
    at: usize,
    state: Tensor,
    is_increment: bool,
    /// Where the linearised step that led to it has started.
    linearized: Tensor,
}

/// What is in slots, earliest first.
#[derive(Default)]
struct Slots {
    kept: Vec<Kept>,
    /// The last state that was restored: the increment below it needs no slot above.
    above: Option<usize>,
}

impl Slots {
    fn drop_state(&mut self, n: usize) {
        let Some(index) = self.kept.iter().position(|kept| kept.at == n) else { return };
        self.kept.remove(index);
        if let Some(below) = index.checked_sub(1).map(|index| &mut self.kept[index])
            && below.is_increment
            && self.above != Some(n)
        {
            // Nothing would be left to decode it from, so it becomes a state.
            below.is_increment = false;
            self.above = None;
        }
    }
}

/// The state at hand, what rounding has left over of it, and where the step that led to it has started.
struct AtHand {
    state: Tensor,
    residual: Tensor,
    linearized: Tensor,
}

impl Decoded<'_> {
    /// dL/dθ, dL/dy0 and y(T) of a loss whose gradient at the end is 2 (y(T) + 1) / numel.
    pub fn gradients(&self, problem: &Problem) -> Result<(Vec<Tensor>, Tensor), OdeError> {
        let (starts, end) = self.starts(&problem.y0.as_detached_tensor())?;
        let mut lambda = ((&end + 1.0)? * (2.0 / end.elem_count() as f64))?;
        let vars = sorted(&problem.vars);
        let mut sums = vars.values().map(|var| var.zeros_like()).collect::<candle_core::Result<Vec<_>>>()?;
        for (n, start) in starts.iter().enumerate().rev() {
            let start = Var::from_tensor(start)?;
            let ode = self.ode.clone().grid(&self.times[n..=n + 1]).adjoint(Unrolled);
            let grads = (ode.solve(start.as_tensor())?.last() * &lambda)?.sum_all()?.backward()?;
            // Candle's gradients carry a graph.
            lambda = grads.get(&start).unwrap().detach();
            for (sum, var) in sums.iter_mut().zip(vars.values()) {
                *sum = (&*sum + grads.get(var).unwrap())?;
            }
        }
        sums.push(lambda);
        Ok((sums, end))
    }

    fn step(&self, n: usize, y: &Tensor) -> Result<Tensor, OdeError> {
        Ok(self.ode.clone().grid(&self.times[n..=n + 1]).no_grad().solve(y)?.last().clone())
    }

    fn coded(&self, x: &Tensor) -> Result<Tensor, OdeError> {
        let (entry, _) = self.codec.encode(&x.into())?;
        Ok(self.codec.decode(&entry, DType::F64)?[0].clone())
    }

    fn is_increments(&self) -> bool {
        self.codec.encodes() == Encodes::Increments
    }

    /// A whole state as it is kept.
    fn whole(&self, y: &Tensor) -> Result<Tensor, OdeError> {
        if self.is_increments() { Ok(y.clone()) } else { self.coded(y) }
    }

    fn starts(&self, y0: &Tensor) -> Result<(Vec<Tensor>, Tensor), OdeError> {
        let steps = self.times.len() - 1;
        let none = y0.zeros_like()?;
        let mut slots = Slots::default();
        let mut hand = AtHand { state: y0.clone(), residual: none.clone(), linearized: none.clone() };
        let (mut found, mut end) = (vec![None; steps], None);
        let actions: Vec<Action> = match self.known {
            true => self.schedule.actions(steps).collect(),
            false => self.schedule.actions_online(steps).collect(),
        };
        let with_stages = self.schedule.slot() == Slot::Stages;
        for (place, action) in actions.iter().enumerate() {
            match *action {
                Action::Advance { from, to } => {
                    // What the schedule drops where it arrives goes before what it keeps there.
                    let next =
                        || actions[place + 1..].iter().take_while(|a| matches!(a, Action::Drop(_) | Action::Keep(_)));
                    let is_kept = next().any(|action| *action == Action::Keep(to));
                    for n in from..to {
                        let after = self.step(n, &hand.state)?;
                        if n + 1 == steps && end.is_none() {
                            end = Some((&after + &hand.residual)?);
                        }
                        if n + 1 == to {
                            next().for_each(|action| {
                                if let Action::Drop(at) = action {
                                    slots.drop_state(*at)
                                }
                            });
                        }
                        hand = self.reach(n + 1, hand, &after, is_kept && n + 1 == to, &mut slots)?;
                    }
                    if !with_stages && to + 1 == steps && end.is_none() {
                        end = Some((self.step(to, &hand.state)? + &hand.residual)?);
                    }
                }
                Action::Keep(_) => {}
                Action::Restore(n) => {
                    slots.above = Some(n);
                    let kept = slots.kept.iter().find(|kept| kept.at == n);
                    let (state, linearized) = kept.map_or((y0, &none), |kept| (&kept.state, &kept.linearized));
                    hand = AtHand { state: state.clone(), residual: none.clone(), linearized: linearized.clone() };
                }
                Action::Drop(n) => slots.drop_state(n),
                Action::Reverse(n) if with_stages => found[n] = Some(hand.linearized.clone()),
                Action::Reverse(n) => {
                    if n + 1 == steps && self.schedule.keeps_last() {
                        // The start of the last step has been kept for the backward pass.
                        hand.state = self.whole(&hand.state)?;
                        slots.above = Some(n);
                    }
                    found[n] = Some(hand.state.clone());
                }
            }
        }
        Ok((found.into_iter().map(Option::unwrap).collect(), end.unwrap()))
    }

    /// State `n`, to which a step from the state at hand has led.
    fn reach(&self, n: usize, hand: AtHand, after: &Tensor, keep: bool, slots: &mut Slots) -> Result<AtHand, OdeError> {
        let none = after.zeros_like()?;
        let AtHand { state: before, residual, .. } = hand;
        let linearized = before.clone();
        let follows = slots.kept.last().is_some_and(|kept| kept.at + 1 == n && !kept.is_increment);
        if keep && follows && self.is_increments() {
            let increment = ((after - &before)? + residual)?;
            let decoded = self.coded(&increment)?;
            slots.kept.last_mut().unwrap().is_increment = true;
            let state = (before + &decoded)?;
            slots.kept.push(Kept { at: n, state: state.clone(), is_increment: false, linearized: linearized.clone() });
            return Ok(AtHand { state, residual: (increment - decoded)?, linearized });
        }
        let state = (after + residual)?;
        if keep {
            let kept = self.whole(&state)?;
            slots.kept.push(Kept { at: n, state: kept, is_increment: false, linearized: linearized.clone() });
        }
        Ok(AtHand { state, residual: none, linearized })
    }
}
