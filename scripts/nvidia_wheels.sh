#!/usr/bin/env bash
# Prints LD_LIBRARY_PATH as it is, and behind it the folders of CUDA's libraries among the Python packages that PyTorch brings
# (site-packages/nvidia/*/lib), where there are any.
folders=$(python3 - <<'PY' 2>/dev/null || true
import glob, os, sysconfig
print(":".join(sorted(glob.glob(os.path.join(sysconfig.get_paths()["purelib"], "nvidia", "*", "lib")))))
PY
)
echo "${LD_LIBRARY_PATH:-}${LD_LIBRARY_PATH:+${folders:+:}}$folders"
