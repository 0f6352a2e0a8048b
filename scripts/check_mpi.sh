#!/usr/bin/env bash
# Training by many processes, for real: mpirun on this machine. Prints the figures: difference of weights to one process for
# 2 and 4, resume with another number, seconds until a run ends whose rank was killed. Minutes on two cores; needs Open MPI and
# libclang (Debian: libopenmpi-dev openmpi-bin libclang-dev).
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v mpicc >/dev/null || ! command -v mpirun >/dev/null; then
    echo "check_mpi.sh: no Open MPI: apt-get install libopenmpi-dev openmpi-bin libclang-dev" >&2
    exit 1
fi
echo "machine: $(nproc) cores, $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), $(mpirun --version | head -n 1)"
cargo clippy --locked --features mpi --all-targets -- -D warnings
cargo test --locked --features mpi --lib ranks::
cargo test --locked --features mpi --test ranks
