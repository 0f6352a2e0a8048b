#!/usr/bin/env bash
# Prints the figures of the README for the model inside the binary, with the machine. Minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release --quiet
jedi=target/release/jedi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

echo "machine: $(nproc) cores, $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)"
echo "model: $(du -sb configs/toybox/model | cut -f1) bytes, $(grep -o '"trained_steps": *[0-9]*' configs/toybox/model/jedi.json)"
echo
$jedi eval --protocol toybox "$@" 2>/dev/null
echo
echo "one picture, 30 steps, start included, seconds (five runs):"
for run in 1 2 3 4 5; do
    start=$(date +%s.%N)
    $jedi sample --ref configs/toybox/examples/robot.png --prompt "a photo of a robot on the beach" --steps 30 \
        --seed "$run" --out "$out" >/dev/null 2>&1
    printf '%.2f ' "$(echo "$(date +%s.%N) - $start" | bc)"
done
echo
