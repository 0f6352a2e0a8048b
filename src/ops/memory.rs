//! What the process is told at its start: how the C allocator treats large freed blocks, and Candle's own threads.

/// Keeps freed memory in the process. glibc hands large blocks back to the system as soon as they are freed; activations
/// are large, freed and asked for again at every layer, and each time the system must zero their pages anew. Call once, at
/// the start. Without glibc it does nothing.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        const KEPT_BYTES: i32 = 1 << 30;
        /// The most that older glibc accepts as mmap threshold (HEAP_MAX_SIZE / 2).
        const OLD_LIMIT_BYTES: i32 = 32 << 20;
        // SAFETY: mallopt only sets the allocator's own parameters and takes its lock; it answers 0 where it refuses.
        unsafe {
            if libc::mallopt(libc::M_MMAP_THRESHOLD, KEPT_BYTES) == 0 {
                libc::mallopt(libc::M_MMAP_THRESHOLD, OLD_LIMIT_BYTES);
            }
            libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT_BYTES);
        }
    }
}

/// Keeps Candle's element-wise operations on the calling thread, unless the user asked for a number of threads. Its own pool
/// waits by spinning, which on a machine that has other work to do (or few cores) costs more than the pool gains: 28 instead
/// of 17 images/s in training the toybox VAE on two shared cores. The work worth sharing out is in `ops`. Call once, first.
pub fn calm_candle_threads() {
    const NAME: &str = "CANDLE_NUM_THREADS";
    if std::env::var_os(NAME).is_none() {
        // SAFETY: called before any other thread exists, so nobody reads the environment meanwhile.
        unsafe { std::env::set_var(NAME, "1") }
    }
}
