#!/usr/bin/env bash
# Compiles and links `--features cuda` without a GPU. Twenty minutes on two cores the first time; in a target
# folder of its own, so that builds without CUDA stay.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v nvcc >/dev/null; then
    if ! exports=$(scripts/cuda_toolkit.sh); then
        echo "check_cuda.sh: no CUDA toolkit, and none could be assembled (see above): the feature cuda is NOT checked here" >&2
        exit 0
    fi
    eval "$exports"
fi
export CARGO_TARGET_DIR=${CUDA_TARGET_DIR:-target/cuda}
cargo build --locked --features cuda
echo "check_cuda.sh: --features cuda compiles and links for compute capability ${CUDA_COMPUTE_CAP:-of this machine's GPU}"
