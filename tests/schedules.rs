//! Schedules are legal, keep to their slots, and compute no step again that they need not.
#![allow(missing_docs)]

use candle_ode::schedule::{Action, Checkpoints, InputOnly, KeepAll, Schedule, Simulated, Slot};
use candle_ode::schedule::{simulate, simulate_slots};
use candle_ode::{OdeError, Result};
use std::collections::{BTreeSet, HashMap};

/// The least steps that must be computed to reverse `m` steps with `slots` slots, by the recursion over every split.
fn recursion(most: usize, slots: usize, slot: Slot) -> Vec<Vec<usize>> {
    let behind = |i: usize| if slot == Slot::Stages { i - 1 } else { i };
    let alone = |m: usize| if slot == Slot::Stages { m * (m + 1) / 2 } else { m * m.saturating_sub(1) / 2 };
    let mut table = vec![(0..=most).map(alone).collect::<Vec<_>>()];
    for c in 1..=slots {
        let mut row: Vec<usize> = (0..=most).map(|m| alone(m.min(1))).collect();
        for m in 2..=most {
            let split = |i: usize| i + table[c - 1][m - i] + row[behind(i)];
            row[m] = (1..m).map(split).min().unwrap();
        }
        table.push(row);
    }
    table
}

fn checkpoints(slots: usize, slot: Slot) -> Checkpoints {
    if slot == Slot::Stages { Checkpoints::new(slots).with_stages() } else { Checkpoints::new(slots) }
}

const KINDS: [Slot; 2] = [Slot::State, Slot::Stages];

/// The forward pass computes these in any case.
fn once(steps: usize, slot: Slot) -> usize {
    if slot == Slot::Stages { steps } else { steps - 1 }
}

#[test]
fn checkpoints_reach_the_optimum_for_every_size() -> Result<()> {
    for slot in KINDS {
        let table = recursion(1024, 40, slot);
        for (slots, least) in table.iter().enumerate() {
            for steps in (1..=70).chain([99, 100, 127, 128, 250, 255, 256, 500, 777, 1000, 1023, 1024]) {
                // Without slots the count is quadratic.
                if slots < 2 && steps > 256 {
                    continue;
                }
                let schedule = checkpoints(slots, slot);
                let found = simulate_slots(schedule.actions(steps), steps, slot)?;
                let least = least[steps] - once(steps, slot);
                assert_eq!(found.recomputed, least, "{steps} steps with {slots} slots of {slot:?}");
                assert_eq!(schedule.recomputed(steps), least);
                assert!(found.most_slots <= slots);
            }
        }
    }
    Ok(())
}

#[test]
fn the_counts_are_those_of_the_literature_or_below() {
    for (steps, slots, recomputed) in [(100, 10, 110), (256, 16, 323), (1024, 32, 1419)] {
        assert_eq!(Checkpoints::new(slots).recomputed(steps), recomputed);
    }
    let with_stages = [(20, 3, 22, 26), (50, 4, 75, 95), (100, 3, 279, 391), (100, 5, 184, 217), (100, 10, 112, 123)];
    for (steps, slots, recomputed, of_pnode) in with_stages {
        let found = Checkpoints::new(slots).with_stages().recomputed(steps);
        assert_eq!(found, recomputed);
        // Its closed form, (t − 1) N − C(c + t, t − 1) + 1 with C(c + t − 1, c) < N ≤ C(c + t, c), pays a slot for y0.
        let binomial = |n: usize, k: usize| (1..=k).fold(1, |b, i| b * (n - k + i) / i);
        let t = (1..).find(|t| steps <= binomial(slots + t, slots)).unwrap();
        assert_eq!((t - 1) * steps + 1 - binomial(slots + t, t - 1), of_pnode);
        assert!(found < of_pnode);
    }
}

/// The least advances over all legal action lists, by breadth-first search over (state at hand, slots, steps left).
fn exhaustive(steps: usize, slots: usize, slot: Slot) -> usize {
    type Node = (Option<usize>, BTreeSet<usize>, usize);
    let needed = |step: usize| if slot == Slot::Stages { step + 1 } else { step };
    let mut costs: HashMap<Node, usize> = HashMap::new();
    let mut queue: std::collections::BTreeMap<usize, Vec<Node>> = Default::default();
    queue.entry(0).or_default().push((Some(0), BTreeSet::new(), steps));
    while let Some((cost, nodes)) = queue.pop_first() {
        for node in nodes {
            let (at, kept, left) = &node;
            if *left == 0 {
                return cost;
            }
            if costs.get(&node).is_some_and(|known| *known <= cost) {
                continue;
            }
            costs.insert(node.clone(), cost);
            let mut next = |by: usize, node: Node| queue.entry(cost + by).or_default().push(node);
            if *at == Some(needed(left - 1)) {
                next(0, (None, kept.clone(), left - 1));
            }
            if let Some(at) = at {
                if *at < needed(left - 1) {
                    next(1, (Some(at + 1), kept.clone(), *left));
                }
                if *at > 0 && kept.len() < slots && !kept.contains(at) {
                    next(0, (Some(*at), kept.iter().copied().chain([*at]).collect(), *left));
                }
            }
            for restored in kept.iter().copied().chain([0]) {
                next(0, (Some(restored), kept.clone(), *left));
            }
            for dropped in kept {
                next(0, (*at, kept.iter().copied().filter(|n| n != dropped).collect(), *left));
            }
        }
    }
    unreachable!("there is always a way")
}

#[test]
fn no_legal_list_of_actions_does_better() -> Result<()> {
    for slot in KINDS {
        for slots in 0..=3 {
            for steps in 1..=if slots < 3 { 12 } else { 10 } {
                let found = simulate_slots(checkpoints(slots, slot).actions(steps), steps, slot)?;
                assert_eq!(found.advanced, exhaustive(steps, slots, slot), "{steps} steps, {slots} slots of {slot:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_number_of_steps_that_is_not_known_ahead_keeps_to_the_slots() -> Result<()> {
    for slot in KINDS {
        for slots in 0..=12 {
            for steps in 1..=100 {
                let schedule = checkpoints(slots, slot);
                let found = simulate_slots(schedule.actions_online(steps), steps, slot)?;
                assert!(found.most_slots <= slots && found.recomputed >= schedule.recomputed(steps));
                if slots >= 4 {
                    let most = 2 * schedule.recomputed(steps) + steps / 2;
                    assert!(found.recomputed <= most, "{} for {steps} with {slots}", found.recomputed);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn the_ends_keep_everything_or_nothing() -> Result<()> {
    for steps in 1..=40 {
        let all = simulate(KeepAll.actions(steps), steps)?;
        assert_eq!(all, Simulated { advanced: steps - 1, recomputed: 0, most_slots: steps - 1 });
        let none = simulate(InputOnly.actions(steps), steps)?;
        assert_eq!((none.recomputed, none.most_slots), (steps - 1, steps.saturating_sub(2)));
        let forward: Vec<Action> = InputOnly.actions(steps).take_while(|a| *a != Action::Restore(0)).collect();
        assert!(forward.iter().all(|action| matches!(action, Action::Advance { .. })));
    }
    Ok(())
}

#[test]
fn a_pass_that_ends_early_is_reversed_from_what_was_kept() -> Result<()> {
    // An observer may stop a solve whose schedule was made for more steps.
    for planned in 1..30 {
        for steps in 1..=planned {
            for slots in 0..5 {
                let schedule = Checkpoints::new(slots);
                let mut sweep = schedule.sweep(Some(planned));
                let (mut actions, mut kept) = (vec![], vec![]);
                for state in 1..steps {
                    actions.push(Action::Advance { from: state - 1, to: state });
                    for action in sweep.reached(state) {
                        kept.push(state);
                        actions.push(action);
                    }
                }
                actions.extend(schedule.reversal(&kept, steps, true));
                assert!(simulate(actions, steps)?.most_slots <= slots);
            }
        }
    }
    Ok(())
}

#[test]
fn what_is_not_legal_is_named() {
    let advance = |from, to| Action::Advance { from, to };
    let cases: [(&[Action], usize); 10] = [
        (&[advance(1, 2)], 0),
        (&[advance(0, 3)], 0),
        (&[advance(0, 1), Action::Keep(2)], 1),
        (&[Action::Keep(0)], 0),
        (&[advance(0, 1), Action::Keep(1), Action::Keep(1)], 2),
        (&[Action::Restore(1)], 0),
        (&[Action::Reverse(0)], 0),
        (&[Action::Reverse(1)], 0),
        (&[Action::Drop(1)], 0),
        (&[advance(0, 1), Action::Reverse(1), Action::Restore(0)], 3),
    ];
    for (actions, at) in cases {
        match simulate(actions.iter().copied(), 2).unwrap_err() {
            OdeError::IllegalAction { index, .. } => assert_eq!(index, at, "{actions:?}"),
            other => panic!("{other}"),
        }
    }
}

#[test]
fn actions_are_printed_in_words() {
    let text: Vec<String> = Checkpoints::new(1).actions(4).map(|action| action.to_string()).collect();
    let expected = [
        "advance 0 -> 1",
        "keep 1",
        "advance 1 -> 3",
        "reverse 3",
        "restore 1",
        "advance 1 -> 2",
        "reverse 2",
        "restore 1",
        "drop 1",
        "reverse 1",
        "restore 0",
        "reverse 0",
    ];
    assert_eq!(text, expected);
}
