//! The optimal backward pass over whatever the forward pass has left in slots.
//!
//! To reverse m steps from a known state with c free slots, the state i steps ahead is kept, the m − i steps behind it
//! are reversed with c − 1 slots, and then the first i with c:
//!
//! R(m, c) = min_i { i + R(m − i, c − 1) + R(i, c) }, R(1, ·) = 0, R(m, 0) = m (m − 1) / 2
//!
//! R grows with m by r(m, c), the least r with C(c + 1 + r, r) ≥ m (so that R is convex in m, and the best i is where
//! the sum under the minimum stops falling), and R(m, c) = r m − C(c + 1 + r, r − 1).
//!
//! Where slots also hold the stages of the step that led to a state,
//! T(m, c) = min_i { i + T(m − i, c − 1) + T(i − 1, c) }, T(1, ·) = 1, T(0, ·) = 0. Then T(m, c) = R(m + 1, c):
//! reversing step n there is what reversing step n + 1 is here, and the first of the m + 1 costs nothing.

use super::{Action, Slot};

/// The least r with C(slots + 1 + r, r) ≥ m: how much R(m, slots) is above R(m − 1, slots).
fn repetitions(m: usize, slots: usize) -> usize {
    let (mut r, mut binomial) = (0, 1_usize);
    while binomial < m {
        r += 1;
        // C(n + 1, r) from C(n, r − 1) with n = slots + r: exact, since every product is a multiple of r.
        binomial = (binomial as u128 * (slots.min(m) + 1 + r) as u128 / r as u128).min(usize::MAX as u128) as usize;
    }
    r
}

/// R(m, slots): the steps that are computed to reverse m of them.
pub(super) fn least_steps(m: usize, slots: usize) -> usize {
    let r = repetitions(m, slots);
    if r == 0 {
        return 0;
    }
    // C(slots + 1 + r, r − 1), by the same recursion. m bounds it: C(slots + r, r − 1) < m.
    let n = slots.min(m) + 1 + r;
    let binomial = (1..r).fold(1_u128, |binomial, k| binomial * (n - r + 1 + k) as u128 / k as u128);
    (r as u128 * m as u128 - binomial) as usize
}

/// The best i for R(m, slots), with m > 2 and slots > 0.
pub(super) fn split(m: usize, slots: usize) -> usize {
    // The sum under the minimum rises from i to i + 1 where 1 + r(i + 1, slots) ≥ r(m − i, slots − 1), and from there
    // on.
    let rises = |i: usize| 1 + repetitions(i + 1, slots) >= repetitions(m - i, slots - 1);
    let (mut low, mut high) = (1, m - 1);
    while low < high {
        let middle = low + (high - low) / 2;
        if rises(middle) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    low
}

/// The actions of a backward pass that computes as few steps again as it can.
#[derive(Debug)]
pub struct Reversal {
    slot: Slot,
    /// What is still to be done, last first.
    tasks: Vec<Task>,
    /// The state at hand.
    position: Option<usize>,
}

#[derive(Clone, Copy, Debug)]
enum Task {
    Do(Action),
    /// Reverse `steps` steps from state `base`, which is in a slot or 0, with `free` slots.
    Segment {
        base: usize,
        steps: usize,
        free: usize,
    },
}

impl Reversal {
    /// Over `steps` steps, of which the states `kept` (ascending) are in some of `slots` slots. What was at hand at the
    /// end of the forward pass still is if `at_last`.
    pub fn new(slot: Slot, kept: &[usize], steps: usize, slots: usize, at_last: bool) -> Self {
        // With stages, one step more: see above.
        let steps = if slot == Slot::Stages { steps + 1 } else { steps };
        let starts = std::iter::once(0).chain(kept.iter().copied());
        let ends = kept.iter().copied().chain([steps]);
        let segments = starts.zip(ends).enumerate().map(|(n, (base, end))| Task::Segment {
            base,
            steps: end.saturating_sub(base),
            free: slots.saturating_sub(n),
        });
        Self { slot, tasks: segments.collect(), position: (at_last && steps > 0).then(|| steps - 1) }
    }

    /// Puts first whatever brings `state` to hand, from a slot at `base` or before it.
    fn reach(&mut self, base: usize, state: usize) {
        let from = self.position.filter(|at| (base..=state).contains(at));
        if from.unwrap_or(base) < state {
            self.tasks.push(Task::Do(Action::Advance { from: from.unwrap_or(base), to: state }));
        }
        if from.is_none() && !(self.slot == Slot::Stages && state == 0) {
            self.tasks.push(Task::Do(Action::Restore(base)));
        }
    }

    fn expand(&mut self, base: usize, steps: usize, free: usize) {
        let Some(last) = (base + steps).checked_sub(1).filter(|_| steps > 0) else { return };
        if steps > 2 && free > 0 && self.position != Some(last) {
            let ahead = split(steps, free);
            self.tasks.push(Task::Segment { base, steps: ahead, free });
            self.tasks.push(Task::Segment { base: base + ahead, steps: steps - ahead, free: free - 1 });
            self.tasks.push(Task::Do(Action::Keep(base + ahead)));
            self.reach(base, base + ahead);
            return;
        }
        self.tasks.push(Task::Segment { base, steps: steps - 1, free });
        match self.slot {
            Slot::State => self.tasks.push(Task::Do(Action::Reverse(last))),
            Slot::Stages => self.tasks.extend(last.checked_sub(1).map(|step| Task::Do(Action::Reverse(step)))),
        }
        if steps == 1 && base > 0 {
            self.tasks.push(Task::Do(Action::Drop(base)));
        }
        self.reach(base, last);
    }
}

impl Iterator for Reversal {
    type Item = Action;

    fn next(&mut self) -> Option<Action> {
        loop {
            match self.tasks.pop()? {
                Task::Segment { base, steps, free } => self.expand(base, steps, free),
                Task::Do(action) => {
                    self.position = match action {
                        Action::Advance { to, .. } => Some(to),
                        Action::Restore(state) => Some(state),
                        Action::Reverse(_) => None,
                        Action::Keep(_) | Action::Drop(_) => self.position,
                    };
                    return Some(action);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The recursion itself, over every split.
    fn tables(most: usize, slots: usize) -> Vec<Vec<usize>> {
        let mut table = vec![(0..=most).map(|m| m * m.saturating_sub(1) / 2).collect::<Vec<_>>()];
        for c in 1..=slots {
            let mut row = vec![0; most + 1];
            for m in 2..=most {
                row[m] = (1..m).map(|i| i + table[c - 1][m - i] + row[i]).min().unwrap_or(0);
            }
            table.push(row);
        }
        table
    }

    #[test]
    fn the_closed_form_and_the_split_solve_the_recursion() {
        let table = tables(1024, 33);
        for (c, row) in table.iter().enumerate() {
            for (m, least) in row.iter().enumerate().skip(1) {
                assert_eq!(least_steps(m, c), *least, "R({m}, {c})");
                if c > 0 && m > 2 {
                    let i = split(m, c);
                    assert_eq!(i + table[c - 1][m - i] + row[i], *least, "split of {m} with {c}: {i}");
                }
            }
        }
    }

    #[test]
    fn slots_beyond_need_and_steps_beyond_memory_are_no_trouble() {
        assert_eq!(least_steps(1000, usize::MAX), 999);
        assert_eq!(split(1000, usize::MAX), 1);
        assert_eq!(least_steps(1 << 20, 0), (1 << 19) * ((1 << 20) - 1));
        assert!(least_steps(1_000_000_000, 30) < 10_000_000_000);
    }
}
