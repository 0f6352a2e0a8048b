//! How exactly f32 matrix products are computed on the CPU.

use std::sync::atomic::{AtomicU8, Ordering};

use serde::{Deserialize, Serialize};

/// The names are PyTorch's (`torch.set_float32_matmul_precision`). The lower ones make a difference only on CPUs with a
/// tile unit (AMX); elsewhere every product is in f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// f32: 24 significant bits.
    #[default]
    Highest,
    /// Factors of 16 significant bits, sums in f32.
    High,
    /// Factors in bf16, 8 significant bits, sums in f32.
    Medium,
}

static PRECISION: AtomicU8 = AtomicU8::new(Precision::Highest as u8);

/// Of all products of this process from now on.
pub fn set_matmul_precision(precision: Precision) {
    PRECISION.store(precision as u8, Ordering::Relaxed);
}

/// The one in force.
pub fn matmul_precision() -> Precision {
    match PRECISION.load(Ordering::Relaxed) {
        0 => Precision::Highest,
        1 => Precision::High,
        _ => Precision::Medium,
    }
}
