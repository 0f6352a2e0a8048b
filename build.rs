//! With the feature `cuda`: compiles the kernels of `src/ops/cuda` by nvcc, for sm_80 (A100) and sm_90 (H100), with PTX for
//! later GPUs, into one image a source file, which the binary carries.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const ROOM: &str = "src/ops/cuda";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed={ROOM}");
    for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo"));
    let nvcc = nvcc();
    let sources = fs::read_dir(ROOM).expect("the room of the kernels").map(|entry| entry.expect("readable").path());
    let sources: Vec<PathBuf> = sources.filter(|path| path.extension().is_some_and(|ending| ending == "cu")).collect();
    // Side by side: the ones for attention take nearly all of the time.
    let compilers: Vec<_> = sources.iter().map(|source| (source, compiler(&nvcc, source, &out).spawn())).collect();
    for (source, compiler) in compilers {
        let compiler = compiler.unwrap_or_else(|error| {
            panic!(
                "{}: {error}; the feature cuda needs NVIDIA's compiler: put the toolkit's bin folder on the PATH, or name \
                 it with CUDA_HOME or NVCC",
                nvcc.display()
            )
        });
        let output = compiler.wait_with_output().expect("nvcc was started");
        let says = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{} did not compile:\n{says}", source.display());
    }
}

/// `NVCC`, else the one of the toolkit that `CUDA_HOME` or `CUDA_PATH` names, else the one on the PATH.
fn nvcc() -> PathBuf {
    if let Some(named) = env::var_os("NVCC") {
        return named.into();
    }
    let of_toolkit = ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(env::var_os);
    let of_toolkit = of_toolkit.map(|toolkit| Path::new(&toolkit).join("bin/nvcc"));
    of_toolkit.into_iter().find(|path| path.exists()).unwrap_or_else(|| "nvcc".into())
}

fn compiler(nvcc: &Path, source: &Path, out: &Path) -> Command {
    let image = out.join(source.file_stem().expect("a file")).with_extension("fatbin");
    let mut command = Command::new(nvcc);
    command.args(["-fatbin", "-std=c++17", "-O3", "--extended-lambda"]);
    for code in ["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_80,code=compute_80"] {
        command.args(["-gencode", code]);
    }
    command.arg("-o").arg(image).arg(source).stderr(std::process::Stdio::piped());
    command
}
