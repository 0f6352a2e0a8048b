#!/usr/bin/env bash
# Whether a build with `--features cuda` computes rightly on this machine's GPU: every operation against the CPU's, forward and
# backward, in f32, f16 and bf16, then under compute-sanitizer where that is installed. Needs the binary, a driver, and CUDA's
# libraries on the loader's path or in the Python packages that PyTorch brings; no Rust, no network.
#
#   scripts/gpu_check.sh [JEDI [BENCH]]       # default: target/release/jedi; with BENCH scripts/gpu_bench.sh follows
set -euo pipefail
jedi=${1:-$(dirname "$0")/../target/release/jedi}
if [ ! -x "$jedi" ]; then
    echo "gpu_check.sh: $jedi is no program; build it with: cargo build --release --features cuda" >&2
    exit 2
fi
if ! nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader; then
    echo "gpu_check.sh: nvidia-smi finds no GPU here" >&2
    exit 1
fi
LD_LIBRARY_PATH=$("$(dirname "$0")/nvidia_wheels.sh")
export LD_LIBRARY_PATH
# The toy model is in the binary; nothing is asked of the hub.
export HF_HUB_OFFLINE=1
failed=0
printf '\n== against the CPU: jedi doctor --device cuda\n'
"$jedi" doctor --device cuda || failed=1
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        printf '\n== compute-sanitizer --tool %s\n' "$tool"
        compute-sanitizer --tool "$tool" --error-exitcode 9 "$jedi" doctor --device cuda || failed=1
    done
else
    echo "gpu_check.sh: no compute-sanitizer: races and bounds are NOT checked on the GPU" >&2
fi
[ "$failed" = 0 ] && printf '\ngpu_check.sh: all passed\n'
if [ "$failed" = 0 ] && [ -n "${2:-}" ]; then
    printf '\n== beside PyTorch\n'
    "$(dirname "$0")/gpu_bench.sh" "$2" || failed=1
fi
exit "$failed"
