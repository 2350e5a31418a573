//! Threads that take tiles, or shares of a kernel's work: each is a pool of one, so that whatever runs on it (a matmul
//! of Candle's, say) finds no other thread to share its work with.

use rayon::{ThreadPool, ThreadPoolBuilder, Yield};
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

thread_local! {
    static AT_WORK: Cell<bool> = const { Cell::new(false) };
    static SHARING: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Bytes of the stack of a worker: Candle's backward pass recurses. Only what is touched is taken.
const STACK: usize = 16 << 20;

/// How many kernels share their work at the moment.
static SHARERS: AtomicUsize = AtomicUsize::new(0);

/// How long a worker looks out for the next share before it sleeps: to wake it takes as long as a small share.
const AWAKE: Duration = Duration::from_micros(500);

/// Threads that Candle would use: the cores, or `RAYON_NUM_THREADS`.
pub(crate) fn most() -> usize {
    rayon::current_num_threads()
}

/// Runs `run`, in which kernels share their work among so many threads, if it says how many.
pub(crate) fn sharing<T>(threads: Option<usize>, run: impl FnOnce() -> T) -> T {
    struct Outer(Option<usize>);
    impl Drop for Outer {
        fn drop(&mut self) {
            SHARING.set(self.0);
        }
    }
    let outer = SHARING.get();
    let _outer = Outer(outer);
    SHARING.set(threads.or(outer));
    run()
}

/// Threads that a kernel may share its work among: unless it is said how many those of the process, as far as others do
/// not share theirs; one where it runs on a worker.
pub(crate) fn to_share() -> usize {
    let free = || most() / (1 + SHARERS.load(Ordering::Relaxed));
    if rayon::current_thread_index().is_some() { 1 } else { SHARING.get().unwrap_or_else(free) }
}

/// Does the jobs at once, the last one on this thread. Who has done one stays awake for a while: others will follow.
pub(crate) fn share<J: Send>(jobs: impl IntoIterator<Item = J>, job: impl Fn(J) + Sync) {
    let mut jobs: Vec<_> = jobs.into_iter().collect();
    let Some(here) = jobs.pop() else { return };
    if jobs.is_empty() {
        return job(here);
    }
    let _sharing = One::more(&SHARERS);
    let Some(team) = Team::of(jobs.len()) else { return jobs.into_iter().chain([here]).for_each(job) };
    let left = AtomicUsize::new(jobs.len());
    let jobs: Vec<_> = jobs.into_iter().map(|job| Mutex::new(Some(job))).collect();
    let work = |n: usize| {
        let _done = One(&left);
        let taken = jobs[n].lock().unwrap_or_else(PoisonError::into_inner).take();
        taken.into_iter().for_each(&job);
    };
    spread(&team.0, 0, &work, || {
        job(here);
        // The others are about to be done, too.
        while left.load(Ordering::Acquire) > 0 {
            std::thread::yield_now();
        }
    });
    team.0.iter().for_each(Worker::stay_awake);
}

/// One of those that are counted, until it ends in whatever way.
struct One<'a>(&'a AtomicUsize);

impl<'a> One<'a> {
    fn more(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for One<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

/// Does jobs `0..jobs`, job n on worker n modulo `threads`. On a worker the jobs are done in place: a field may solve.
pub(crate) fn each<T: Send>(threads: usize, jobs: usize, job: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let Some(team) = (!AT_WORK.get()).then(|| Team::of(threads)).flatten() else { return (0..jobs).map(job).collect() };
    let done = Mutex::new((0..jobs).map(|_| None).collect::<Vec<Option<T>>>());
    let subscriber = tracing::dispatcher::get_default(Clone::clone);
    let work = |worker: usize| {
        AT_WORK.set(true);
        let own = || {
            for n in (worker..jobs).step_by(threads) {
                let result = job(n);
                done.lock().unwrap_or_else(PoisonError::into_inner)[n] = Some(result);
            }
        };
        tracing::dispatcher::with_default(&subscriber, own);
    };
    spread(&team.0, 0, &work, || {});
    drop(team);
    done.into_inner().unwrap_or_else(PoisonError::into_inner).into_iter().flatten().collect()
}

/// Starts `work` on the first worker and, meanwhile, on the others, then does what is to be done `here`; waits for all.
fn spread(workers: &[Worker], n: usize, work: &(impl Fn(usize) + Sync), here: impl FnOnce()) {
    match workers.get(n) {
        Some(worker) => worker.pool.in_place_scope(|scope| {
            scope.spawn(move |_| work(n));
            spread(workers, n + 1, work, here);
        }),
        None => here(),
    }
}

/// A pool of one thread.
struct Worker {
    pool: ThreadPool,
    /// Whether it looks out for work.
    awake: Arc<AtomicBool>,
}

impl Worker {
    fn new() -> Option<Self> {
        let pool = ThreadPoolBuilder::new().num_threads(1).stack_size(STACK).thread_name(|_| "candle-ode".into());
        Some(Self { pool: pool.build().ok()?, awake: Arc::default() })
    }

    fn stay_awake(&self) {
        if self.awake.swap(true, Ordering::AcqRel) {
            return;
        }
        let awake = self.awake.clone();
        self.pool.spawn(move || {
            let mut since = Instant::now();
            while since.elapsed() < AWAKE {
                match rayon::yield_now() {
                    Some(Yield::Executed) => since = Instant::now(),
                    _ => std::thread::yield_now(),
                }
            }
            awake.store(false, Ordering::Release);
        });
    }
}

/// Workers that nobody else uses meanwhile; they are kept for the next who wants some. So no solve waits for another's,
/// wherever it runs.
struct Team(Vec<Worker>);

static IDLE: Mutex<Vec<Worker>> = Mutex::new(vec![]);

impl Team {
    /// So many; `None` where the system gives no more threads.
    fn of(threads: usize) -> Option<Self> {
        let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = idle.len().saturating_sub(threads);
        let mut team = Self(idle.drain(kept..).collect());
        drop(idle);
        while team.0.len() < threads {
            team.0.push(Worker::new()?);
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
    fn shares_are_done_once_each_the_last_one_here() {
        for jobs in [0, 1, 2, 5] {
            let done = Mutex::new(vec![]);
            share(0..jobs, |n| done.lock().unwrap().push((n, current().id())));
            let mut done = done.into_inner().unwrap();
            done.sort_by_key(|(n, _)| *n);
            assert_eq!(done.iter().map(|(n, _)| *n).collect::<Vec<_>>(), (0..jobs).collect::<Vec<_>>());
            let here = done.iter().filter(|(_, thread)| *thread == current().id()).map(|(n, _)| n + 1);
            assert_eq!(here.collect::<Vec<_>>(), if jobs > 0 { vec![jobs] } else { vec![] });
        }
    }

    #[test]
    fn nothing_is_shared_beside_others() {
        let inner = || sharing(Some(3), || each(2, 2, |_| to_share()));
        assert_eq!((inner(), sharing(Some(3), to_share)), (vec![1, 1], 3));
    }

    #[test]
    fn a_panic_reaches_the_caller_and_spoils_no_worker() {
        let panics = || each(2, 2, |n| if n == 1 { panic!("of a job") } else { n });
        assert!(std::panic::catch_unwind(panics).is_err());
        assert_eq!(each(2, 3, |n| n), [0, 1, 2]);
    }
}
