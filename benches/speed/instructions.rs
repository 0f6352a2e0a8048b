//! What this CPU's multiply-adds reach with nothing to load or store: the peak that no matrix product passes, and whether
//! bf16 has more to give than f32 (some CPUs that have AVX512-BF16 run it at half the rate of f32).

use std::sync::Barrier;
use std::thread;
use std::time::Instant;

use anyhow::{Result, ensure};
use jedi::{ops, report};

/// A loop over registers alone: turns → operations done.
type Loop = fn(u64) -> f64;

/// Prints GFLOP/s of each instruction on as many threads as the kernels take.
pub fn instructions() -> Result<()> {
    let loops = loops();
    ensure!(!loops.is_empty(), "no loop is written for this CPU's instructions");
    for (name, run) in loops {
        report::result(format!(
            "{name:<24}{:>6.0} GFLOP/s on {} threads",
            rate(run, ops::threads()) / 1e9,
            ops::threads()
        ))?;
    }
    Ok(())
}

/// The best of five, in operations a second of all threads together.
fn rate(run: Loop, threads: usize) -> f64 {
    const TURNS: u64 = 5_000_000;
    let together = |_| {
        let start = Barrier::new(threads);
        let of_thread = || {
            start.wait();
            let began = Instant::now();
            run(TURNS) / began.elapsed().as_secs_f64()
        };
        thread::scope(|scope| {
            let running: Vec<_> = (0..threads).map(|_| scope.spawn(of_thread)).collect();
            running.into_iter().map(|thread| thread.join().expect("loops do not panic")).sum::<f64>()
        })
    };
    (0..5).map(together).fold(0.0, f64::max)
}

#[cfg(not(target_arch = "x86_64"))]
fn loops() -> Vec<(&'static str, Loop)> {
    Vec::new()
}

#[cfg(target_arch = "x86_64")]
fn loops() -> Vec<(&'static str, Loop)> {
    // SAFETY (of each): called only where the machine has the instructions.
    let all: [(&str, bool, Loop); 3] = [
        ("AVX2 FMA, f32", is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"), |n| unsafe {
            x86::avx2(n)
        }),
        ("AVX-512 FMA, f32", is_x86_feature_detected!("avx512f"), |n| unsafe { x86::avx512(n) }),
        ("AVX512-BF16 dot, bf16", is_x86_feature_detected!("avx512bf16"), |n| unsafe { x86::bf16(n) }),
    ];
    all.into_iter().filter(|(_, is_there, _)| *is_there).map(|(name, _, run)| (name, run)).collect()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    /// Sums side by side: enough for each to be ready when its turn comes, few enough for the registers.
    const SUMS: usize = 12;

    #[target_feature(enable = "avx2,fma")]
    pub fn avx2(turns: u64) -> f64 {
        let (a, b) = (_mm256_set1_ps(black_box(0.5)), _mm256_set1_ps(black_box(0.25)));
        let mut sums = [_mm256_setzero_ps(); SUMS];
        for _ in 0..turns {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(a, b, *sum);
            }
        }
        black_box(sums);
        (turns * SUMS as u64 * 16) as f64
    }

    #[target_feature(enable = "avx512f")]
    pub fn avx512(turns: u64) -> f64 {
        let (a, b) = (_mm512_set1_ps(black_box(0.5)), _mm512_set1_ps(black_box(0.25)));
        let mut sums = [_mm512_setzero_ps(); SUMS];
        for _ in 0..turns {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(a, b, *sum);
            }
        }
        black_box(sums);
        (turns * SUMS as u64 * 32) as f64
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn bf16(turns: u64) -> f64 {
        let ones = _mm512_set1_ps(black_box(1.0));
        let (a, b) = (_mm512_cvtne2ps_pbh(ones, ones), _mm512_cvtne2ps_pbh(ones, ones));
        let mut sums = [_mm512_setzero_ps(); SUMS];
        for _ in 0..turns {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, a, b);
            }
        }
        black_box(sums);
        (turns * SUMS as u64 * 64) as f64
    }
}
