#!/usr/bin/env bash
# Kills `jedi synth-data` at random moments and runs it again: are the shards those of an undisturbed run, byte for byte?
# usage: scripts/check_synth_kill.sh [KILLS] [SETS]     JEDI=target/release/jedi     prints e.g. "20 of 20"
set -euo pipefail
cd "$(dirname "$0")/.."

kills=${1:-20} sets=${2:-12}
jedi=${JEDI:-target/release/jedi}
if [ ! -x "$jedi" ]; then
    echo "$jedi: not there; build it with \`cargo build --release\`, or name another with JEDI=…" >&2
    exit 1
fi
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
synth() { # folder; in place of the subshell that calls it, so that a signal meets it
    exec "$jedi" synth-data --config configs/synth-toybox.toml --set sets.sets_per_shard=4 --set sets.batch=2 \
        --sets "$sets" --keep-rejected --device cpu --out "$1"
}
# Everything but the report (which tells seconds) and the manifest's temporary copies.
bytes() { (cd "$1" && find . -name '*.tar' -not -path './.work/*' | LC_ALL=C sort | xargs sha256sum; cat dataset.json); }

start=$(date +%s%N)
(synth "$room/whole") >/dev/null 2>"$room/whole.log" || { cat "$room/whole.log" >&2; exit 1; }
milliseconds=$((($(date +%s%N) - start) / 1000000))
echo "undisturbed: $milliseconds ms, $(find "$room/whole" -maxdepth 1 -name '*.tar' | wc -l) shards" >&2

same=0 broken=0
for number in $(seq "$kills"); do
    folder=$room/killed-$number
    (synth "$folder") >/dev/null 2>&1 &
    child=$!
    pause=$((RANDOM * milliseconds / 32768))
    sleep "$(printf '%d.%03d' $((pause / 1000)) $((pause % 1000)))"
    if kill -KILL "$child" 2>/dev/null; then broken=$((broken + 1)); fi
    wait "$child" 2>/dev/null || true
    (synth "$folder") >/dev/null 2>"$room/again.log" || { cat "$room/again.log" >&2; continue; }
    left=$(find "$folder" -name '.*.tmp' -not -path '*/.work/*' -name '*.tar.*' | wc -l)
    if [ "$(bytes "$folder")" = "$(bytes "$room/whole")" ] && [ ! -e "$folder/.work" ] && [ "$left" = 0 ]; then
        same=$((same + 1))
    else
        echo "kill $number after $pause ms: other bytes" >&2
    fi
    rm -rf "$folder"
done
echo "$broken runs were killed before their end" >&2
echo "$same of $kills"
[ "$same" = "$kills" ]
