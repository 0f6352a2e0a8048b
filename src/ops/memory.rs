//! What the process settles about the machine's memory and CPUs before it computes.

use std::{env, thread};

/// Gives the kernels and Candle's pool a thread a physical core, but no more than `cpus`, those that this process should keep
/// busy (None: not known, and nothing is done). By itself Candle counts the machine's cores, whatever a container's quota or an
/// affinity mask leaves of them, and its threads, which wait for each other by spinning, are very slow when they outnumber the
/// CPUs. Call first thing in the process. `CANDLE_NUM_THREADS` and `RAYON_NUM_THREADS` override it.
pub fn fit_threads(cpus: Option<usize>) {
    let is_set = |name: &str| env::var_os(name).is_some();
    if is_set(CANDLE_THREADS) || is_set(RAYON_THREADS) {
        return;
    }
    let Some(cpus) = cpus else { return };
    let threads = cpus.min(candle_core::utils::get_num_threads());
    // SAFETY: nothing else reads or writes the environment meanwhile: this runs before the process has started a
    // second thread.
    unsafe { env::set_var(CANDLE_THREADS, threads.to_string()) }
    if thread::available_parallelism().is_ok_and(|all| cpus < all.get()) {
        // SAFETY: as above. Other processes have the rest of the CPUs.
        unsafe { env::set_var(RAYON_THREADS, cpus.to_string()) }
    }
}

/// Says how many threads compute.
pub const CANDLE_THREADS: &str = "CANDLE_NUM_THREADS";
const RAYON_THREADS: &str = "RAYON_NUM_THREADS";

/// Keeps freed memory in the process. glibc hands large blocks back to the system as soon as they are freed; activations
/// are large, freed and asked for again at every layer, and each time the system must zero their pages anew. Call once, at
/// the start. Without glibc it does nothing.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        const KEPT_BYTES: i32 = 1 << 30;
        /// The most that older glibc accepts as mmap threshold (HEAP_MAX_SIZE / 2).
        const OLD_LIMIT_BYTES: i32 = 32 << 20;
        /// By which the heap grows at least; what is not touched takes no memory.
        const GROWTH_BYTES: i32 = 64 << 20;
        // SAFETY: mallopt only sets the allocator's own parameters and takes its lock; it answers 0 where it refuses.
        unsafe {
            if libc::mallopt(libc::M_MMAP_THRESHOLD, KEPT_BYTES) == 0 {
                libc::mallopt(libc::M_MMAP_THRESHOLD, OLD_LIMIT_BYTES);
            }
            libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT_BYTES);
            libc::mallopt(libc::M_TOP_PAD, GROWTH_BYTES);
        }
    }
}

/// Asks for pages of 2 MiB (transparent huge pages) from this block to the heap's end, unless that was done: a training step
/// reads and writes all of its memory, and takes up to a tenth longer where each 4 KiB of it must be looked up.
pub fn in_large_pages(block: *mut u8) {
    #[cfg(not(all(target_os = "linux", target_env = "gnu")))]
    let _ = block;
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
        /// Where the part of the heap ends that was asked for.
        static LARGE_PAGES_END: AtomicUsize = AtomicUsize::new(0);
        let known = LARGE_PAGES_END.load(Relaxed);
        let block = block as usize;
        if block < known {
            return;
        }
        // SAFETY: with 0 the call only says where the heap ends.
        let end = unsafe { libc::sbrk(0) } as usize;
        // Other threads' heaps, and blocks of a mapping of their own, lie beyond.
        if block >= end {
            return;
        }
        let start = if known == 0 { block & !4095 } else { known };
        // SAFETY: advice about the heap's memory, which stays as it is. Two threads may give it twice.
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
        LARGE_PAGES_END.fetch_max(end, Relaxed);
    }
}

/// Bytes of memory that the process has now; None where the system does not tell (other than Linux).
pub fn resident_bytes() -> Option<u64> {
    status("VmRSS:")
}

/// The most that [`resident_bytes`] ever was.
pub fn peak_resident_bytes() -> Option<u64> {
    status("VmHWM:")
}

/// A number of `/proc/self/status` (proc(5)), which are in kB of 1024 bytes.
fn status(name: &str) -> Option<u64> {
    // Any failure means that the system does not tell.
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
