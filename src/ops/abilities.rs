//! What the kernels have to work with on this machine.

use super::{parallel, tiles};

/// The instruction sets that the kernels use here, the plainest first.
pub fn instructions() -> Vec<&'static str> {
    let mut found = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            found.push("AVX2");
        }
        if is_x86_feature_detected!("avx512f") {
            found.push("AVX-512");
        }
    }
    #[cfg(target_arch = "aarch64")]
    found.push("NEON");
    if tiles::available() {
        found.push("AMX");
    }
    found
}

/// Threads that share the work of an operation.
pub fn threads() -> usize {
    parallel::parts(usize::MAX, 1)
}
