//! How much memory tensors take: every large block that the process asks for is counted, and a trace tells how high the
//! count rose from one operation to the next. It costs two atomic additions a large block.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::RefCell;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use super::memory::in_large_pages;

/// Smaller blocks are not counted: there are many of them, and little in them.
const SMALLEST_BYTES: usize = 4096;
/// Blocks from this size on are asked to lie in large pages.
const LARGE_BYTES: usize = 1 << 20;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static HIGHEST: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The system's allocator, with a count of what is out.
struct Counting;

/// Counts a block.
pub fn taken(n_bytes: usize) {
    if n_bytes >= SMALLEST_BYTES {
        let live = LIVE.fetch_add(n_bytes, Relaxed) + n_bytes;
        HIGHEST.fetch_max(live, Relaxed);
    }
}

/// The way back.
pub fn given_back(n_bytes: usize) {
    if n_bytes >= SMALLEST_BYTES {
        LIVE.fetch_sub(n_bytes, Relaxed);
    }
}

// SAFETY: every call is handed on to the system's allocator as it is; what is added neither allocates nor panics.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are those of `System`.
        let block = unsafe { System.alloc(layout) };
        if !block.is_null() {
            taken(layout.size());
            if layout.size() >= LARGE_BYTES {
                in_large_pages(block);
            }
        }
        block
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        let block = unsafe { System.alloc_zeroed(layout) };
        if !block.is_null() {
            taken(layout.size());
        }
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        given_back(layout.size());
        // SAFETY: as above.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: as above.
        let new = unsafe { System.realloc(block, layout, new_size) };
        if !new.is_null() {
            taken(new_size);
            given_back(layout.size());
        }
        new
    }
}

thread_local! {
    static TRACE: RefCell<Option<Vec<usize>>> = const { RefCell::new(None) };
}

/// Called by every operation on its way forward and back.
pub fn note_operation() {
    TRACE.with_borrow_mut(|trace| {
        if let Some(trace) = trace {
            trace.push(HIGHEST.swap(LIVE.load(Relaxed), Relaxed));
        }
    });
}

/// The result of `f`, and the most bytes in large blocks from each operation on this thread to the next, over what was out
/// before. What other threads do meanwhile is counted too.
pub fn trace_memory<R>(f: impl FnOnce() -> R) -> (R, Vec<usize>) {
    let before = LIVE.load(Relaxed);
    HIGHEST.store(before, Relaxed);
    TRACE.set(Some(Vec::new()));
    let result = f();
    note_operation();
    let trace = TRACE.take().unwrap_or_default();
    (result, trace.into_iter().map(|highest| highest.saturating_sub(before)).collect())
}
