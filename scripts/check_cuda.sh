#!/usr/bin/env bash
# Compiles and links `--features cudnn`, and with it `cuda`, without a GPU. A quarter of an hour on two cores the first
# time; in a target folder of its own, so that builds without CUDA stay.
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
# Without optimisation: nothing of it runs here.
cargo build --locked --features cudnn --config profile.dev.opt-level=0 --config 'profile.dev.package."*".opt-level=0' \
    --config profile.dev.debug=false
echo "check_cuda.sh: --features cudnn compiles and links for compute capability ${CUDA_COMPUTE_CAP:-as of the GPU here}"
