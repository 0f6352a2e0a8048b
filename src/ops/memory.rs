//! How the C allocator treats large freed blocks.

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
