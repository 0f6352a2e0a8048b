#!/usr/bin/env bash
# Everything that must hold before a commit: format, lints, docs, tests. Stops at the first step that fails and names it.
set -euo pipefail
cd "$(dirname "$0")/.."

step() {
    local name=$1
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    if ! "$@"; then
        printf '\ncheck.sh: step "%s" failed\n' "$name" >&2
        exit 1
    fi
}

if ! command -v g++ >/dev/null; then
    echo "check.sh: no g++: the kernels for GPUs are NOT checked by running them on the CPU" >&2
fi
step format cargo fmt --check
step lints cargo clippy --locked --all-targets -- -D warnings
step docs env RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps
step tests cargo test --locked
step kernels cargo test --locked --lib cuda:: -- --ignored
printf '\ncheck.sh: all steps passed\n'
