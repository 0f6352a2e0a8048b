#!/usr/bin/env bash
# Whether a build with `--features cuda` computes rightly on this machine's GPU: every operation against the CPU's, forward and
# backward, in f32, f16 and bf16, then under compute-sanitizer where that is installed. Needs the binary, a driver, and CUDA's
# libraries on the loader's path or in the Python packages that PyTorch brings; no Rust, no network.
#
#   scripts/gpu_check.sh [JEDI]       # default: target/release/jedi
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
# The libraries of PyTorch's wheels: site-packages/nvidia/*/lib.
wheels=$(python3 - <<'PY' 2>/dev/null || true
import glob, os, sysconfig
print(":".join(sorted(glob.glob(os.path.join(sysconfig.get_paths()["purelib"], "nvidia", "*", "lib")))))
PY
)
if [ -n "$wheels" ]; then
    export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$wheels
fi
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
exit "$failed"
