#!/usr/bin/env bash
# Kills a run with SIGKILL at random moments, also while a checkpoint is written, starts it again each time, and compares
# what it leaves with what a run leaves that nobody disturbed: weights, moments and averages to the last bit.
#
#   scripts/check_kill.sh [KILLS] [SEED]      prints "20 of 20" and exits 0 if all is equal
#
# JEDI names the binary (default: target/release/jedi, else target/debug/jedi), STEPS the length of the run.
set -euo pipefail
cd "$(dirname "$0")/.."

kills=${1:-20}
RANDOM=${2:-$$}
steps=${STEPS:-16}
jedi=${JEDI:-target/release/jedi}
[ -x "$jedi" ] || jedi=target/debug/jedi
[ -x "$jedi" ] || { echo "check_kill.sh: no binary; cargo build --release, or JEDI=path" >&2; exit 2; }

room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT

# A checkpoint at every second step, so that many kills hit one that is being written.
start() { # in a subshell, whose process becomes the run's
    exec "$jedi" train --device cpu --config configs/toybox/joint.toml --out "$1" \
        --set model.vae=configs/toybox/model --set model.start_from=configs/toybox/model \
        --set data.sets=64 --set run.images_per_step=12 --set run.steps=$steps --set run.checkpoint_every=2 \
        --set run.keep_last=2 --set run.validate_every=0 --set run.preview_images=0 >"$room/log" 2>&1
}
fingerprint() { # of the state, the model and the losses
    (cd "$1/checkpoints/step-$steps" && sha256sum state/optimizer.safetensors unet/*.safetensors text_encoder/*.safetensors)
    sed 's/"seconds":[^,]*,//' "$1/metrics.jsonl" | sha256sum
}

began=$(date +%s%N)
(start "$room/whole") || { cat "$room/log" >&2; exit 1; }
millis=$((($(date +%s%N) - began) / 1000000))
whole=$(fingerprint "$room/whole")
echo "undisturbed: $steps steps in $millis ms"

equal=0 half=0
for ((kill = 1; kill <= kills; kill++)); do
    out="$room/killed-$kill"
    (start "$out") &
    run=$!
    delay=$((RANDOM * millis / 32768))
    sleep "$(printf '%d.%03d' $((delay / 1000)) $((delay % 1000)))"
    if kill -KILL "$run" 2>/dev/null; then state=killed; else state="over already"; fi
    wait "$run" 2>/dev/null || true
    made=$([ -f "$out/metrics.jsonl" ] && wc -l <"$out/metrics.jsonl" || echo 0)
    if compgen -G "$out/checkpoints/.step-*" >/dev/null; then
        state="$state, a checkpoint half written"
        half=$((half + 1))
    fi
    (start "$out") || { cat "$room/log" >&2; exit 1; }
    if [ "$(fingerprint "$out")" = "$whole" ]; then
        equal=$((equal + 1))
        verdict=equal
    else
        verdict=DIFFERENT
    fi
    echo "kill $kill after $delay ms, step $made ($state): $verdict"
    rm -rf "$out"
done
echo "$equal of $kills ($half of them left a checkpoint half written)"
[ "$equal" = "$kills" ]
