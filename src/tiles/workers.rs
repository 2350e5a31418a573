//! Threads that take tiles: each is a pool of one, so that whatever runs on it (a matmul of Candle's, say) finds no other
//! thread to share its work with.

use rayon::{ThreadPool, ThreadPoolBuilder};
use std::cell::Cell;
use std::sync::{Arc, Mutex, PoisonError};

thread_local! {
    static AT_WORK: Cell<bool> = const { Cell::new(false) };
}

/// Threads that Candle would use: the cores, or `RAYON_NUM_THREADS`.
pub(super) fn most() -> usize {
    rayon::current_num_threads()
}

/// Does jobs `0..jobs`, job n on thread n modulo `threads`. On a worker the jobs are done in place: a field may solve.
pub(super) fn each<T: Send>(threads: usize, jobs: usize, job: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let Some(pools) = pools(threads).filter(|_| !AT_WORK.get()) else { return (0..jobs).map(job).collect() };
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
    spread(&pools, 0, &work);
    done.into_inner().unwrap_or_else(PoisonError::into_inner).into_iter().flatten().collect()
}

/// Starts `work` on the first pool and, meanwhile, on the others; waits for all.
fn spread(pools: &[Arc<ThreadPool>], worker: usize, work: &(impl Fn(usize) + Sync)) {
    if let Some((first, rest)) = pools.split_first() {
        first.in_place_scope(|scope| {
            scope.spawn(move |_| work(worker));
            spread(rest, worker + 1, work);
        });
    }
}

/// So many workers, made when first asked for and kept. `None` where the system gives no threads.
fn pools(threads: usize) -> Option<Vec<Arc<ThreadPool>>> {
    static POOLS: Mutex<Vec<Arc<ThreadPool>>> = Mutex::new(vec![]);
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    while pools.len() < threads {
        let name = format!("tiles-{}", pools.len());
        let pool = ThreadPoolBuilder::new().num_threads(1).thread_name(move |_| name.clone()).build().ok()?;
        pools.push(Arc::new(pool));
    }
    Some(pools[..threads].to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_job_is_done_once_on_its_own_thread() {
        let name = |n: usize| (n, std::thread::current().name().map(str::to_owned));
        for threads in [1, 2, 5] {
            let done = each(threads, 7, name);
            for (n, (job, thread)) in done.iter().enumerate() {
                assert_eq!((*job, thread.as_deref()), (n, Some(format!("tiles-{}", n % threads).as_str())));
            }
        }
    }

    #[test]
    fn a_worker_works_alone() {
        assert!(each(2, 2, |_| rayon::current_num_threads()).iter().all(|n| *n == 1));
        let inner = each(2, 2, |_| each(2, 2, |_| std::thread::current().name().map(str::to_owned)));
        assert!(inner.iter().all(|names| names[0] == names[1]));
    }
}
