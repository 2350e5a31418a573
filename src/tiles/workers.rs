//! Threads that take tiles: each is a pool of one, so that whatever runs on it (a matmul of Candle's, say) finds no other
//! thread to share its work with.

use rayon::{ThreadPool, ThreadPoolBuilder};
use std::cell::Cell;
use std::sync::{Mutex, PoisonError};

thread_local! {
    static AT_WORK: Cell<bool> = const { Cell::new(false) };
}

/// Bytes of the stack of a worker: Candle's backward pass recurses. Only what is touched is taken.
const STACK: usize = 16 << 20;

/// Threads that Candle would use: the cores, or `RAYON_NUM_THREADS`.
pub(super) fn most() -> usize {
    rayon::current_num_threads()
}

/// Does jobs `0..jobs`, job n on worker n modulo `threads`. On a worker the jobs are done in place: a field may solve.
pub(super) fn each<T: Send>(threads: usize, jobs: usize, job: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let Some(team) = (!AT_WORK.get()).then(|| Team::of(threads)).flatten() else { return (0..jobs).map(job).collect() };
    let done = Mutex::new((0..jobs).map(|_| None).collect::<Vec<Option<T>>>());
    let subscriber = tracing::dispatcher::get_default(Clone::clone);
    let work = |worker: usize| {
        AT_WORK.set(true);
        let share = || {
            for n in (worker..jobs).step_by(threads) {
                let result = job(n);
                done.lock().unwrap_or_else(PoisonError::into_inner)[n] = Some(result);
            }
        };
        tracing::dispatcher::with_default(&subscriber, share);
    };
    spread(&team.0, 0, &work);
    drop(team);
    done.into_inner().unwrap_or_else(PoisonError::into_inner).into_iter().flatten().collect()
}

/// Starts `work` on the first pool and, meanwhile, on the others; waits for all.
fn spread(pools: &[ThreadPool], worker: usize, work: &(impl Fn(usize) + Sync)) {
    if let Some((first, rest)) = pools.split_first() {
        first.in_place_scope(|scope| {
            scope.spawn(move |_| work(worker));
            spread(rest, worker + 1, work);
        });
    }
}

/// Workers that nobody else uses meanwhile; they are kept for the next who wants some. So no solve waits for another's,
/// wherever it runs.
struct Team(Vec<ThreadPool>);

static IDLE: Mutex<Vec<ThreadPool>> = Mutex::new(vec![]);

impl Team {
    /// So many; `None` where the system gives no more threads.
    fn of(threads: usize) -> Option<Self> {
        let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = idle.len().saturating_sub(threads);
        let mut team = Self(idle.drain(kept..).collect());
        drop(idle);
        while team.0.len() < threads {
            let pool = ThreadPoolBuilder::new().num_threads(1).stack_size(STACK).thread_name(|_| "tiles".into());
            team.0.push(pool.build().ok()?);
        }
        Some(team)
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        IDLE.lock().unwrap_or_else(PoisonError::into_inner).append(&mut self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread::{ThreadId, current};

    fn places(threads: usize, jobs: usize) -> Vec<ThreadId> {
        each(threads, jobs, |_| current().id())
    }

    #[test]
    fn every_job_is_done_once_on_its_own_thread() {
        for threads in [1, 2, 5] {
            let done = each(threads, 7, |n| (n, current().id()));
            for (n, (job, thread)) in done.iter().enumerate() {
                assert_eq!((*job, *thread), (n, done[n % threads].1));
                assert_ne!(*thread, current().id());
            }
            let mut different: Vec<_> = done.iter().map(|(_, thread)| format!("{thread:?}")).collect();
            different.sort();
            different.dedup();
            assert_eq!(different.len(), threads);
        }
    }

    #[test]
    fn a_worker_works_alone() {
        assert!(each(2, 2, |_| rayon::current_num_threads()).iter().all(|n| *n == 1));
        assert!(
            each(2, 2, |_| (current().id(), places(2, 2))).iter().all(|(own, inner)| inner.iter().all(|id| id == own))
        );
    }

    /// A job that solves on a thread of its own would otherwise wait for the worker that waits for it.
    #[test]
    fn jobs_on_threads_of_jobs_have_workers_of_their_own() {
        let inner = each(1, 1, |_| std::thread::scope(|scope| scope.spawn(|| places(1, 1)).join().unwrap()));
        assert_eq!(inner[0].len(), 1);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_spoils_no_worker() {
        let panics = || each(2, 2, |n| if n == 1 { panic!("of a job") } else { n });
        assert!(std::panic::catch_unwind(panics).is_err());
        assert_eq!(each(2, 3, |n| n), [0, 1, 2]);
    }
}
