#!/usr/bin/env bash
# Prints the folders of CUDA's libraries among the Python packages that PyTorch brings (site-packages/nvidia/*/lib), for
# LD_LIBRARY_PATH; nothing where there are none.
python3 - <<'PY' 2>/dev/null || true
import glob, os, sysconfig
print(":".join(sorted(glob.glob(os.path.join(sysconfig.get_paths()["purelib"], "nvidia", "*", "lib")))))
PY
