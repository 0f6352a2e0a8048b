//! The kernels' sources on the CPU, for the tests: compiled by g++ with `emulation/emulation.h` in CUDA's place.
//!
//! Every launch runs twice, in orders of the threads drawn by different lots: watched for accesses outside of the tensors
//! and for undefined behaviour, and watched for races. Both must give the same bits.

use std::cell::Cell;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{LazyLock, Mutex};

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Storage, Tensor, bail};

use super::launch::{Argument, Fresh, Launch};
use crate::sha256::sha256_hex;

thread_local! {
    static IS_ON: Cell<bool> = const { Cell::new(false) };
}

/// Whether operations of this thread take the kernels.
pub fn is_on() -> bool {
    IS_ON.get()
}

/// Runs `f` with the kernels in place of the CPU's; they must have been [`built`].
pub fn emulated<R>(f: impl FnOnce() -> R) -> R {
    struct Off;
    impl Drop for Off {
        fn drop(&mut self) {
            IS_ON.set(false);
        }
    }
    IS_ON.set(true);
    let _off = Off;
    crate::ops::graft::composed(f)
}

/// Builds that watch, and what for.
const WATCHED: [(&str, &[&str]); 2] =
    [("bounds", &["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]), ("races", &["-fsanitize=thread"])];

static PROGRAMS: LazyLock<Option<[PathBuf; 2]>> = LazyLock::new(build);

/// Whether there is a g++ to build them with; `scripts/check.sh` says so where there is none.
pub fn built() -> bool {
    PROGRAMS.is_some()
}

fn build() -> Option<[PathBuf; 2]> {
    if Command::new("g++").arg("--version").output().is_err() {
        return None;
    }
    let room = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/ops/cuda");
    let mut files: Vec<PathBuf> = [room.clone(), room.join("emulation")]
        .iter()
        .flat_map(|folder| fs::read_dir(folder).expect("the sources are there"))
        .map(|entry| entry.expect("a folder that can be read").path())
        .filter(|path| {
            path.extension().is_some_and(|ending| ["cu", "cuh", "cpp", "h"].iter().any(|own| ending == *own))
        })
        .collect();
    files.sort();
    let all: Vec<u8> = files.iter().flat_map(|file| fs::read(file).expect("a source")).collect();
    let tests = std::env::current_exe().expect("a path");
    let target = tests.parent().expect("in a folder").join("emulated");
    fs::create_dir_all(&target).expect("a writable target folder");
    let version = &sha256_hex(&all)[..16];
    Some(WATCHED.map(|(name, flags)| {
        let program = target.join(format!("{name}-{version}"));
        if !program.exists() {
            compile(&files, flags, &program);
        }
        program
    }))
}

/// All sources into one program; the temporary name keeps half a program from being run.
fn compile(files: &[PathBuf], flags: &[&str], program: &Path) {
    let half = program.with_extension(format!("{}.half", std::process::id()));
    let ends = |file: &&PathBuf, ending: &str| file.extension().is_some_and(|own| own == ending);
    // Loops kept from becoming calls of memcpy, which a sanitizer would watch where it must not.
    let output = Command::new("g++")
        .args(["-std=c++17", "-O1", "-g1", "-Wall", "-Wno-unknown-pragmas", "-fno-tree-loop-distribute-patterns"])
        .args(flags)
        .args(["-x", "c++"])
        .args(files.iter().filter(|file| ends(file, "cu") || ends(file, "cpp")))
        .arg("-o")
        .arg(&half)
        .output()
        .expect("g++ runs");
    assert!(output.status.success(), "the kernels do not compile:\n{}", String::from_utf8_lossy(&output.stderr));
    fs::rename(&half, program).expect("the same folder");
}

/// One launch, as [`super::launch::run`].
pub fn run(launch: &Launch, arguments: &mut [Argument]) -> Result<()> {
    let Some(programs) = &*PROGRAMS else { bail!("the kernels are not built") };
    // On a GPU the kernel is looked for in the image of this source.
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/ops/cuda").join(launch.source).with_extension("cu");
    let name = ["_f32", "_f16", "_bf16"]
        .iter()
        .fold(&*launch.kernel, |name, format| name.split(format).next().unwrap_or(name));
    if !fs::read_to_string(&source)?.contains(name) {
        bail!("{}: not in {}", launch.kernel, source.display());
    }
    let mut outputs = Vec::new();
    for (seed, program) in (1..).zip(programs) {
        outputs.push(output_of(program, &request(launch, arguments, seed)?, &launch.kernel)?);
    }
    if outputs[0] != outputs[1] {
        bail!("{}: the result depends on the order of the threads", launch.kernel);
    }
    write_back(arguments, &outputs[0])
}

fn number(to: &mut Vec<u8>, value: usize) {
    to.extend((value as u32).to_le_bytes());
}

/// What `emulation/main.cpp` reads.
fn request(launch: &Launch, arguments: &[Argument], seed: u32) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    number(&mut bytes, launch.kernel.len());
    bytes.extend(launch.kernel.as_bytes());
    let [x, y, z] = launch.blocks;
    for value in [x, y, z, launch.threads, launch.shared, seed as usize, arguments.len()] {
        number(&mut bytes, value);
    }
    arguments.iter().try_for_each(|argument| put_argument(&mut bytes, argument))?;
    Ok(bytes)
}

fn put_argument(bytes: &mut Vec<u8>, argument: &Argument) -> Result<()> {
    match argument {
        Argument::Int(value) => {
            number(bytes, 0);
            number(bytes, *value);
        }
        Argument::Float(value) => {
            number(bytes, 0);
            bytes.extend(value.to_le_bytes());
        }
        Argument::Read(tensor) | Argument::Change(tensor) => {
            let values = bytes_of(tensor)?;
            number(bytes, 1);
            number(bytes, values.len());
            bytes.extend(values);
        }
        Argument::Nothing => number(bytes, 2),
        Argument::Fill(fresh) => {
            number(bytes, 3);
            number(bytes, fresh.shape.elem_count() * fresh.storage.dtype().size_in_bytes());
        }
        Argument::Table(words) => {
            number(bytes, 4);
            number(bytes, words.len());
            words.iter().try_for_each(|word| put_argument(bytes, word))?;
        }
    }
    Ok(())
}

fn output_of(program: &Path, request: &[u8], kernel: &str) -> Result<Vec<u8>> {
    let mut command = Command::new(program);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // At its end ThreadSanitizer would wait a second for threads that may still run; there are none.
    command.env("TSAN_OPTIONS", "atexit_sleep_ms=0");
    #[cfg(target_os = "linux")]
    // SAFETY: one system call between fork and exec. ThreadSanitizer needs its addresses free; where this is not
    // allowed, it says so itself.
    unsafe {
        std::os::unix::process::CommandExt::pre_exec(&mut command, || {
            libc::personality(libc::ADDR_NO_RANDOMIZE as libc::c_ulong);
            Ok(())
        });
    }
    let mut child = command.spawn()?;
    // It reads all before it writes anything. One that ends early says why on stderr.
    let _ = child.stdin.take().expect("piped").write_all(request);
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("{kernel}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(output.stdout)
}

fn bytes_of(x: &Tensor) -> Result<Vec<u8>> {
    if !x.is_contiguous() {
        bail!("a kernel was given a tensor that is not contiguous");
    }
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { bail!("not on the CPU") };
    let range = layout.start_offset()..layout.start_offset() + x.elem_count();
    Ok(match storage {
        CpuStorage::F32(values) => values[range].iter().flat_map(|v| v.to_le_bytes()).collect(),
        CpuStorage::F16(values) => values[range].iter().flat_map(|v| v.to_le_bytes()).collect(),
        CpuStorage::BF16(values) => values[range].iter().flat_map(|v| v.to_le_bytes()).collect(),
        _ => bail!("kernels take f32, f16 and bf16"),
    })
}

/// Reads little-endian values into memory of any of the formats.
fn put(storage: &mut CpuStorage, start: usize, bytes: &[u8]) -> Result<()> {
    macro_rules! fill {
        ($values:expr, $type:ty) => {
            for (value, bytes) in $values[start..].iter_mut().zip(bytes.chunks_exact(size_of::<$type>())) {
                *value = <$type>::from_le_bytes(bytes.try_into().expect("as many bytes"));
            }
        };
    }
    match storage {
        CpuStorage::F32(values) => fill!(values, f32),
        CpuStorage::F16(values) => fill!(values, half::f16),
        CpuStorage::BF16(values) => fill!(values, half::bf16),
        _ => bail!("kernels take f32, f16 and bf16"),
    }
    Ok(())
}

/// New contents of a tensor, where it is.
struct Put<'a>(Mutex<&'a [u8]>);

impl InplaceOp1 for Put<'_> {
    fn name(&self) -> &'static str {
        "put"
    }
    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        put(storage, layout.start_offset(), &self.0.lock().expect("no panic while held"))
    }
}

fn write_back(arguments: &mut [Argument], output: &[u8]) -> Result<()> {
    let mut rest = output;
    arguments.iter_mut().try_for_each(|argument| take_back(argument, &mut rest))
}

fn take_back(argument: &mut Argument, rest: &mut &[u8]) -> Result<()> {
    let size = match argument {
        Argument::Read(x) | Argument::Change(x) => x.elem_count() * x.dtype().size_in_bytes(),
        Argument::Fill(Fresh { storage, shape }) => shape.elem_count() * storage.dtype().size_in_bytes(),
        Argument::Table(words) => return words.iter_mut().try_for_each(|word| take_back(word, rest)),
        Argument::Int(_) | Argument::Float(_) | Argument::Nothing => return Ok(()),
    };
    let (own, others) = rest.split_at(size);
    *rest = others;
    match argument {
        Argument::Read(x) if bytes_of(x)? != own => bail!("a kernel wrote to what it should only read"),
        Argument::Change(x) => x.inplace_op1(&Put(Mutex::new(own)))?,
        Argument::Fill(Fresh { storage: Storage::Cpu(storage), .. }) => put(storage, 0, own)?,
        _ => {}
    }
    Ok(())
}
