//! Which instructions the kernels run on: chosen once, by what the CPU has.

use super::lanes::{Lanes, Plain};
use super::scheme::{Scheme, Widened};
#[cfg(target_arch = "x86_64")]
use super::x86::{Dots, Eight, Sixteen};
use half::bf16;
use std::sync::OnceLock;

/// A set of instructions that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Path {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
}

impl Path {
    /// The paths that this CPU has, the fastest last.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn all() -> Vec<Self> {
        use std::is_x86_feature_detected as has;
        let avx2 = has!("avx2") && has!("fma");
        let avx512 = avx2 && has!("avx512f") && has!("avx512dq") && has!("avx512bw") && has!("avx512vl");
        let found = [
            (Self::Portable, true),
            (Self::Avx2, avx2),
            (Self::Avx512, avx512),
            (Self::Avx512Bf16, avx512 && has!("avx512bf16")),
        ];
        found.into_iter().filter(|(_, has)| *has).map(|(path, _)| path).collect()
    }

    /// The paths that this CPU has, the fastest last.
    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn all() -> Vec<Self> {
        vec![Self::Portable]
    }

    /// The fastest path of this CPU.
    pub(crate) fn best() -> Self {
        static BEST: OnceLock<Path> = OnceLock::new();
        *BEST.get_or_init(|| Self::all().pop().unwrap_or(Self::Portable))
    }

    /// Does the work with the instructions of this path, which the CPU must have: it came from [`all`](Self::all) or
    /// [`best`](Self::best).
    pub(crate) fn run<W: Work>(self, work: W) -> W::Output {
        match self {
            // SAFETY: no CPU lacks what the target has.
            Self::Portable => unsafe { work.run::<Portable>() },
            // SAFETY: paths are made by `all`, which has found the features on this CPU.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { avx2(work) },
            // SAFETY: likewise.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { avx512(work) },
            // SAFETY: likewise.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => unsafe { avx512_bf16(work) },
        }
    }
}

/// What is to be compiled for every path. `run` and all that it calls must be `#[inline(always)]` to be part of it.
pub(crate) trait Work {
    /// What it gives.
    type Output;
    /// Does the work.
    ///
    /// # Safety
    /// The CPU has the instructions of `M`.
    unsafe fn run<M: Machine>(self) -> Self::Output;
}

/// The vectors of a path.
pub(crate) trait Machine {
    /// F32 lanes.
    type Lanes: Lanes;
    /// Products of BF16 pairs.
    type Pairs: Scheme<Element = bf16, Lanes = Self::Lanes>;
}

pub(crate) struct Portable;

impl Machine for Portable {
    type Lanes = Plain;
    type Pairs = Widened<Plain>;
}

macro_rules! machine {
    ($machine:ident, $lanes:ty, $pairs:ty, $enter:ident, $features:literal) => {
        #[cfg(target_arch = "x86_64")]
        pub(crate) struct $machine;

        #[cfg(target_arch = "x86_64")]
        impl Machine for $machine {
            type Lanes = $lanes;
            type Pairs = $pairs;
        }

        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = $features)]
        fn $enter<W: Work>(work: W) -> W::Output {
            // SAFETY: the features are enabled here, so whoever came here has them.
            unsafe { work.run::<$machine>() }
        }
    };
}

machine!(Avx2, Eight, Widened<Eight>, avx2, "avx2,fma");
machine!(Avx512, Sixteen, Widened<Sixteen>, avx512, "avx2,fma,avx512f,avx512dq,avx512bw,avx512vl");
machine!(Avx512Bf16, Sixteen, Dots, avx512_bf16, "avx2,fma,avx512f,avx512dq,avx512bw,avx512vl,avx512bf16");
