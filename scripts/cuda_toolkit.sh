#!/usr/bin/env bash
# Assembles what `--features cuda` is built with (CUDA 13.0: nvcc, cuBLAS, cuRAND, NVRTC, cuDNN, NCCL) from NVIDIA's Python
# wheels, for machines without a CUDA installation, or without a GPU: the driver's library is stood in for by one of empty
# functions, to link against. 2 GB are downloaded the first time.
#
#     source <(scripts/cuda_toolkit.sh [FOLDER])      FOLDER: ~/.cache/jedi-cuda; prints the exports
set -euo pipefail
folder=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/jedi-cuda}
toolkit=$folder/toolkit

assemble() {
    python3 -m venv "$folder/python"
    "$folder/python/bin/pip" install --quiet --disable-pip-version-check \
        'nvidia-cuda-nvcc==13.0.88' 'nvidia-cuda-runtime==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cuda-crt==13.0.*' \
        'nvidia-cuda-cccl==13.0.*' 'nvidia-cublas==13.0.*' 'nvidia-cuda-nvrtc==13.0.*' nvidia-curand \
        nvidia-cudnn-cu13 nvidia-nccl-cu13
    local wheels part file
    wheels=$("$folder/python/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia
    rm -rf "$toolkit"
    mkdir -p "$toolkit/include" "$toolkit/lib64/stubs"
    ln -s "$wheels/cu13/bin" "$wheels/cu13/nvvm" "$toolkit/"
    for part in cu13 cudnn nccl; do
        ln -sf "$wheels/$part"/include/* "$toolkit/include/"
        for file in "$wheels/$part"/lib/*; do
            ln -sf "$file" "$toolkit/lib64/"
            # Wheels hold libx.so.1 alone; linkers look for libx.so.
            case $file in *.so.*) ln -sf "$file" "$toolkit/lib64/$(basename "${file%%.so.*}").so" ;; esac
        done
    done
    # Every name that cuda.h declares, and their later versions, as a function without a body.
    grep -oE '\bcu[A-Z][A-Za-z0-9_]+ *[(;]|\bcu[A-Z][A-Za-z0-9]+_v[0-9]+\b' "$toolkit/include/cuda.h" |
        tr -d ' (;' | sort -u | sed 's/.*/void &(void) {}/' >"$folder/driver.c"
    cc -w -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$toolkit/lib64/stubs/libcuda.so" "$folder/driver.c"
    touch "$toolkit/.whole"
}

[[ -e $toolkit/.whole ]] || assemble >&2
cat <<EXPORTS
export CUDA_HOME="$toolkit" CUDA_PATH="$toolkit" CUDA_TOOLKIT_ROOT_DIR="$toolkit" CUDNN_LIB="$toolkit/lib64"
export PATH="$toolkit/bin:\$PATH" LIBRARY_PATH="$toolkit/lib64:$toolkit/lib64/stubs\${LIBRARY_PATH:+:\$LIBRARY_PATH}"
export CUDA_COMPUTE_CAP=\${CUDA_COMPUTE_CAP:-80}
EXPORTS
