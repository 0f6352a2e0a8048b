//! The two float types of the CPU kernels and their vectorisable elementary functions.

use candle_core::WithDType;

/// f32 in use, f64 in the gradient checks.
pub trait Real:
    WithDType
    + std::ops::Neg<Output = Self>
    + std::iter::Sum
    + std::ops::MulAssign
    + std::ops::SubAssign
    + PartialOrd
    + 'static
{
    const ZERO: Self;
    const ONE: Self;
    /// Full precision for f64; for f32 a branch-free polynomial that vectorises, within 2 units in the last place. `FUSED` says
    /// that multiplying and adding is one instruction, as inside [`vectorised!`] functions.
    fn exp_by<const FUSED: bool>(self) -> Self;
    /// As [`Real::exp_by`].
    fn erf_by<const FUSED: bool>(self) -> Self;
    fn sqrt(self) -> Self;
    fn ln(self) -> Self;
    fn of(value: f64) -> Self;
    fn greater(self, other: Self) -> Self;
}

/// ln 2 in two pieces, the first with few bits, so that n·ln 2 is exact enough.
pub const LN_2_PIECES: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
/// Coefficients 1/k! of exp's Taylor polynomial of degree 7, the highest first.
pub const EXP_TAYLOR: [f32; 8] =
    [1.984_127e-4, 1.388_889e-3, 8.333_334e-3, 4.166_666_7e-2, 1.666_666_7e-1, 0.5, 1.0, 1.0];

impl Real for f64 {
    const ZERO: f64 = 0.0;
    const ONE: f64 = 1.0;
    fn exp_by<const FUSED: bool>(self) -> f64 {
        f64::exp(self)
    }
    fn erf_by<const FUSED: bool>(self) -> f64 {
        candle_core::cpu::erf::erf_f64(self)
    }
    fn sqrt(self) -> f64 {
        f64::sqrt(self)
    }
    fn ln(self) -> f64 {
        f64::ln(self)
    }
    fn of(value: f64) -> f64 {
        value
    }
    fn greater(self, other: f64) -> f64 {
        if self > other { self } else { other }
    }
}

/// a·b + c; without the instruction `mul_add` is a call.
#[inline(always)]
fn times_plus<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

impl Real for f32 {
    const ZERO: f32 = 0.0;
    const ONE: f32 = 1.0;

    /// exp(x) = 2ⁿ·exp(r), n = round(x/ln 2), |r| ≤ ln2/2, exp(r) by its Taylor polynomial of degree 7.
    #[inline(always)]
    fn exp_by<const FUSED: bool>(self) -> f32 {
        // Adding 1.5·2²³ rounds to the nearest integer, which then stands in the low bits; a cast would be a call a lane.
        const ROUND: f32 = 12_582_912.0;
        let x = self.clamp(-87.0, 88.0);
        let rounded = times_plus::<FUSED>(x, std::f32::consts::LOG2_E, ROUND);
        let n = rounded - ROUND;
        let r = times_plus::<FUSED>(n, -LN_2_PIECES[1], times_plus::<FUSED>(n, -LN_2_PIECES[0], x));
        let mut p = EXP_TAYLOR[0];
        for c in &EXP_TAYLOR[1..] {
            p = times_plus::<FUSED>(p, r, *c);
        }
        let power = rounded.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23; // of two, 2ⁿ
        p * f32::from_bits(power)
    }

    /// Rational minimax approximation x·P(x²)/Q(x²) on [−4, 4] (the one of Eigen and XLA), beyond which erf is ±1 in f32.
    #[inline(always)]
    fn erf_by<const FUSED: bool>(self) -> f32 {
        let x = self.clamp(-4.0, 4.0);
        let x2 = x * x;
        let mut p = -2.726_142_4e-10_f32;
        for c in [2.770_681_4e-8, -2.101_024e-6, -5.692_506_4e-5, -7.349_906e-4, -2.954_6e-3, -1.609_603_3e-2] {
            p = times_plus::<FUSED>(p, x2, c);
        }
        let mut q = -1.456_606_5e-5_f32;
        for c in [-2.133_740_6e-4, -1.682_827e-3, -7.373_329e-3, -1.426_473_9e-2] {
            q = times_plus::<FUSED>(q, x2, c);
        }
        x * p / q
    }
    #[inline(always)]
    fn sqrt(self) -> f32 {
        f32::sqrt(self)
    }
    fn ln(self) -> f32 {
        f32::ln(self)
    }
    #[inline(always)]
    fn of(value: f64) -> f32 {
        value as f32
    }
    #[inline(always)]
    fn greater(self, other: f32) -> f32 {
        if self > other { self } else { other }
    }
}

/// Defines a function that is compiled for AVX-512, for AVX2 and for the target's baseline, and runs the widest that this
/// machine has. The loops inside are left to the compiler's vectoriser, so what they call must be `#[inline(always)]`, and
/// every slice that they index cut to the length that they run to: checked indices are not vectorised. `FUSED` says inside
/// whether multiplying and adding is one instruction.
/// Generics stand in square brackets: `vectorised! { fn f[T: Real](x: &[T]) { … } }`.
macro_rules! vectorised {
    (
        $(#[$attribute:meta])*
        $visibility:vis fn $name:ident[$($generics:tt)*]($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block
    ) => {
        $(#[$attribute])*
        $visibility fn $name<$($generics)*>($($argument: $type),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
                fn avx512<$($generics)*>($($argument: $type),*) $(-> $result)? {
                    #[allow(dead_code)]
                    const FUSED: bool = true;
                    #[inline(always)]
                    fn body<$($generics)*>($($argument: $type),*) $(-> $result)? $body
                    body($($argument),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2<$($generics)*>($($argument: $type),*) $(-> $result)? {
                    #[allow(dead_code)]
                    const FUSED: bool = true;
                    #[inline(always)]
                    fn body<$($generics)*>($($argument: $type),*) $(-> $result)? $body
                    body($($argument),*)
                }
                let has_avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
                let has_avx512 = is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512bw");
                // SAFETY: each is called only where the machine has the features that it is compiled for.
                if has_avx512 && has_avx2 {
                    return unsafe { avx512($($argument),*) };
                }
                if has_avx2 {
                    return unsafe { avx2($($argument),*) };
                }
            }
            #[allow(dead_code)]
            const FUSED: bool = cfg!(target_arch = "aarch64");
            #[inline(always)]
            fn body<$($generics)*>($($argument: $type),*) $(-> $result)? $body
            body($($argument),*)
        }
    };
}
pub(super) use vectorised;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f32_exp_and_erf_agree_with_f64_to_the_last_places() {
        for step in -40_000..=40_000 {
            let x = step as f32 / 500.0;
            let exact = (x as f64).exp();
            for found in [x.exp_by::<false>(), x.exp_by::<true>()] {
                assert!((f64::from(found) - exact).abs() <= 3e-7 * exact, "exp({x})");
            }
            let exact = f64::from(x).erf_by::<false>();
            for found in [x.erf_by::<false>(), x.erf_by::<true>()] {
                assert!((f64::from(found) - exact).abs() <= 6e-7, "erf({x})");
            }
        }
    }
}
