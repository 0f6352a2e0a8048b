#!/usr/bin/env bash
# Makes a checkpoint of the toybox recipes the model inside the binary: configs/toybox/model, in f16.
# Usage: scripts/embed_toybox.sh [runs/toybox/checkpoints/latest]
set -euo pipefail
cd "$(dirname "$0")/.."
checkpoint=$(realpath "${1:-runs/toybox/checkpoints/latest}")
new=configs/toybox/model.new
rm -rf "$new"
cargo run --release --quiet -- convert --model "$checkpoint" --dtype f16 --out "$new"
rm -rf configs/toybox/model
mv "$new" configs/toybox/model
du -sb configs/toybox/model
