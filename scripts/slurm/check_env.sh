#!/usr/bin/env bash
# Is this machine, or this allocation, fit for `jedi train` on many processes? Tells what is there and what is missing; exit
# code 1 if something is missing without which it cannot run. Inside an allocation: srun --ntasks-per-node=1 scripts/slurm/check_env.sh
# Usage: [JEDI=path/to/jedi] scripts/slurm/check_env.sh [run folder]
set -uo pipefail
jedi=${JEDI:-jedi}
out=${1:-.}
missing=0
good() { printf '%s: ok: %s\n' "$(hostname)" "$*"; }
warn() { printf '%s: note: %s\n' "$(hostname)" "$*"; }
bad() {
    printf '%s: MISSING: %s\n' "$(hostname)" "$*"
    missing=1
}

if program=$(command -v "$jedi"); then
    good "$("$jedi" --version 2>/dev/null | head -n 1) at $program"
    if ldd "$program" | grep -q 'libmpi'; then
        library=$(ldd "$program" | awk '/libmpi[^_]*\.so/ {print $3; exit}')
        [ -e "$library" ] && good "built with MPI: $library" || bad "its MPI library is not on this machine (module load?)"
    else
        bad "$program was built without MPI: cargo build --release --features nccl (GPUs) or mpi (CPUs)"
    fi
    if ldd "$program" | grep -q 'libnccl'; then
        library=$(ldd "$program" | awk '/libnccl/ {print $3; exit}')
        [ -e "$library" ] && good "built with NCCL: $library" || bad "its NCCL library is not on this machine (module load?)"
    elif command -v nvidia-smi >/dev/null; then
        warn "built without NCCL: gradients between GPUs go through the host's memory (cargo build --release --features nccl)"
    fi
    ldd "$program" | grep 'not found' | while read -r line; do warn "library $line"; done
else
    bad "no program $jedi: set JEDI, or put it on the PATH"
fi

if command -v mpirun >/dev/null; then
    good "$(mpirun --version | head -n 1)"
else
    warn "no mpirun; srun alone will do if it has a PMI plugin for the MPI"
fi
if command -v srun >/dev/null; then
    plugins=$(srun --mpi=list 2>&1 | tr '\n' ' ')
    case $plugins in
        *pmix* | *pmi2*) good "srun's plugins: $plugins" ;;
        *) bad "srun knows neither pmix nor pmi2 ($plugins): start by mpirun inside of sbatch instead" ;;
    esac
else
    warn "no srun: not a Slurm machine"
fi

# What a rank will get.
good "$(nproc) CPUs here${SLURM_CPUS_PER_TASK:+, $SLURM_CPUS_PER_TASK a task}"
if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=index,name,memory.total --format=csv,noheader | while read -r gpu; do good "GPU $gpu"; done
else
    warn "no nvidia-smi: training runs on the CPUs"
fi

# Checkpoints and pictures.
if mkdir -p "$out" && probe=$(mktemp "$out/.jedi-probe.XXXXXX"); then
    rm -f "$probe"
    good "$out can be written, $(df -h --output=avail "$out" | tail -n 1 | tr -d ' ') free"
else
    bad "$out cannot be written"
fi
good "limit on open files $(ulimit -n), on locked memory $(ulimit -l) kB"
exit $missing
