#!/usr/bin/env bash
# How fast jedi is on this machine's GPU beside PyTorch (eager with SDPA, and compiled), and in how much memory: operations,
# sampling step, training steps. Needs the bench binary, and Python with torch, diffusers and transformers (or what pip installed
# of the last two into a folder that PYTHONPATH names); no Rust, no network.
#
#   cargo bench --bench speed --features cudnn --no-run      # elsewhere, tells of target/release/deps/speed-…
#   scripts/gpu_bench.sh BENCH [RESULTS] [NAME…]            # RESULTS: a folder [benches/results]; NAME: parts of case names
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
bench=${1:-}
results=${2:-$here/../benches/results}
shift $(($# < 2 ? $# : 2))
if [ ! -x "$bench" ]; then
    echo "gpu_bench.sh: ${bench:-BENCH} is no program; build it with: cargo bench --bench speed --features cudnn --no-run" >&2
    exit 2
fi
if ! gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1) || [ -z "$gpu" ]; then
    echo "gpu_bench.sh: nvidia-smi finds no GPU here" >&2
    exit 1
fi
LD_LIBRARY_PATH=$("$here/nvidia_wheels.sh")
export LD_LIBRARY_PATH HF_HUB_OFFLINE=1
mkdir -p "$results"
name=$results/$(date +%Y-%m-%d)-$(tr -cs '[:alnum:]' - <<<"$gpu" | sed 's/-*$//')
only=()
[ $# = 0 ] || only=(--only "$@")
python3 "$here/bench_vs_torch.py" --device cuda --jedi "$(realpath "$bench")" --rounds 5 --json "$name.json" "${only[@]}" | tee "$name.md"
