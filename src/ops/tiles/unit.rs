//! The tile unit itself: whether it is there, its registers, and the sums of products.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::sync::OnceLock;

use super::Tile;

/// Whether this machine has the unit and the system lets this process use it.
pub fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        let vectors = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
        vectors && has_unit() && permitted()
    })
}

/// CPUID leaf 7: AMX-BF16 is bit 22 of EDX, AMX-TILE bit 24.
fn has_unit() -> bool {
    const BOTH: u32 = 1 << 22 | 1 << 24;
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & BOTH == BOTH
}

/// Linux hands out the 8 KiB of tile registers on request only (`arch_prctl`, ARCH_REQ_XCOMP_PERM, component 18).
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    // SAFETY: the call changes nothing but this process's permission.
    unsafe { libc::syscall(libc::SYS_arch_prctl, 0x1023, 18) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// The tile registers of this thread, in use until it is dropped: 0–3 outputs, 4 and 5 left factors, 6 and 7 right ones.
pub struct Registers(());

impl Registers {
    /// For blocks of `pairs` pairs along the sum.
    ///
    /// # Safety
    /// [`available`], and no other `Registers` on this thread.
    pub unsafe fn new(pairs: usize) -> Self {
        #[repr(C, align(64))]
        struct Config {
            palette: u8,
            start_row: u8,
            reserved: [u8; 14],
            bytes: [u16; 16],
            rows: [u8; 16],
        }
        let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], bytes: [0; 16], rows: [0; 16] };
        config.bytes[..8].fill(64);
        config.rows[..8].fill(16);
        config.bytes[4..6].fill(pairs as u16 * 4);
        config.rows[6..8].fill(pairs as u8);
        // SAFETY: the unit is there; the sizes are within palette 1's 16 rows of 64 bytes.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly)) };
        Self(())
    }
}

impl Drop for Registers {
    /// So that the system need not save them.
    fn drop(&mut self) {
        // SAFETY: the unit is there.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// Where the tiles of a factor lie: strides in bytes.
#[derive(Clone, Copy)]
pub struct Tiles {
    /// Of one or two rows of tiles (left factor) or columns of them (right factor).
    pub starts: [*const u8; 2],
    /// From one of a tile's 16 rows to the next.
    pub row_stride: usize,
    pub plane_stride: usize,
}

impl Tiles {
    /// Whole tiles, `[step][plane]`.
    pub fn whole(starts: [*const Tile; 2]) -> Self {
        Self { starts: starts.map(|start| start.cast()), row_stride: 64, plane_stride: size_of::<Tile>() }
    }
}

/// How far behind its start each factor's tile for a step of the sum lies, in bytes: left, right.
pub type Step = (usize, usize);

/// Four output tiles, two above two: start and bytes from row to row.
pub type Outputs = [(*mut u8, usize); 4];

macro_rules! load {
    ($register:literal, $from:expr, $stride:expr) => {
        asm!(concat!("tileloadd ", $register, ", [{from} + {stride}]"), from = in(reg) $from, stride = in(reg) $stride,
            options(nostack, readonly))
    };
}

macro_rules! dot {
    ($out:literal, $a:literal, $b:literal) => {
        asm!(concat!("tdpbf16ps ", $out, ", ", $a, ", ", $b), options(nostack, nomem))
    };
}

impl Registers {
    /// H×W output tiles as sums over steps, in all products of planes that matter, added to what lies at `from`.
    ///
    /// # Safety
    /// All tiles lie inside their allocations.
    #[inline]
    unsafe fn multiply<const PLANES: usize, const H: usize, const W: usize>(
        &self,
        steps: &[Step],
        left: Tiles,
        right: Tiles,
        out: Outputs,
        from: Option<Outputs>,
    ) {
        macro_rules! output {
            ($number:literal, $register:literal) => {
                if $number / 2 < H && $number % 2 < W {
                    if let Some(from) = &from {
                        load!($register, from[$number].0, from[$number].1)
                    } else {
                        asm!(concat!("tilezero ", $register), options(nostack, nomem))
                    }
                }
            };
        }
        macro_rules! store {
            ($number:literal, $register:literal) => {
                if $number / 2 < H && $number % 2 < W {
                    let (at, stride) = out[$number];
                    asm!(concat!("tilestored [{at} + {stride}], ", $register), at = in(reg) at, stride = in(reg) stride,
                        options(nostack))
                }
            };
        }
        // SAFETY: the caller's contract.
        unsafe {
            output!(0, "tmm0");
            output!(1, "tmm1");
            output!(2, "tmm2");
            output!(3, "tmm3");
            let load_left = |step: Step, plane: usize| {
                let offset = step.0 + plane * left.plane_stride;
                load!("tmm4", left.starts[0].wrapping_add(offset), left.row_stride);
                if H == 2 {
                    load!("tmm5", left.starts[1].wrapping_add(offset), left.row_stride);
                }
            };
            let load_right = |step: Step, plane: usize| {
                let offset = step.1 + plane * right.plane_stride;
                load!("tmm6", right.starts[0].wrapping_add(offset), right.row_stride);
                if W == 2 {
                    load!("tmm7", right.starts[1].wrapping_add(offset), right.row_stride);
                }
            };
            let multiply = || {
                dot!("tmm0", "tmm4", "tmm6");
                if W == 2 {
                    dot!("tmm1", "tmm4", "tmm7");
                }
                if H == 2 {
                    dot!("tmm2", "tmm5", "tmm6");
                }
                if H == 2 && W == 2 {
                    dot!("tmm3", "tmm5", "tmm7");
                }
            };
            // The small products of all steps come first: added to sums that are still small they lose next to nothing, and
            // what rounding is left is that of one product. Each change of planes loads one side only.
            for &step in steps.iter().take(if PLANES == 1 { 0 } else { steps.len() }) {
                load_left(step, 0);
                if PLANES == 3 {
                    load_right(step, 2);
                    multiply();
                }
                load_right(step, 1);
                multiply();
                load_left(step, 1);
                if PLANES == 3 {
                    multiply();
                }
                load_right(step, 0);
                multiply();
                if PLANES == 3 {
                    load_left(step, 2);
                    multiply();
                }
            }
            for &step in steps {
                load_left(step, 0);
                load_right(step, 0);
                multiply();
            }
            store!(0, "tmm0");
            store!(1, "tmm1");
            store!(2, "tmm2");
            store!(3, "tmm3");
        }
    }

    /// [`Registers::multiply`] for a size known at run time.
    ///
    /// # Safety
    /// As there.
    #[inline]
    pub unsafe fn multiply_some<const PLANES: usize>(
        &self,
        size: (usize, usize),
        steps: &[Step],
        factors: (Tiles, Tiles),
        (out, add): (Outputs, bool),
    ) {
        // SAFETY: the caller's contract.
        unsafe { self.multiply_from::<PLANES>(size, steps, factors, out, add.then_some(out)) };
    }

    /// The same, added to what lies at `from`, where a stride of 0 takes one row for all.
    ///
    /// # Safety
    /// As there.
    #[inline]
    pub unsafe fn multiply_from<const PLANES: usize>(
        &self,
        size: (usize, usize),
        steps: &[Step],
        (left, right): (Tiles, Tiles),
        out: Outputs,
        from: Option<Outputs>,
    ) {
        // SAFETY: the caller's contract.
        unsafe {
            match size {
                (2, 2) => self.multiply::<PLANES, 2, 2>(steps, left, right, out, from),
                (2, _) => self.multiply::<PLANES, 2, 1>(steps, left, right, out, from),
                (_, 2) => self.multiply::<PLANES, 1, 2>(steps, left, right, out, from),
                _ => self.multiply::<PLANES, 1, 1>(steps, left, right, out, from),
            }
        }
    }
}
