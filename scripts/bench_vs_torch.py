#!/usr/bin/env python3
"""Compares jedi with PyTorch (diffusers, transformers) on the same shapes, taking turns in one run.

    python3 -m venv venv && venv/bin/pip install torch==2.15.0 diffusers==0.36.0 transformers==4.57.6
    venv/bin/python scripts/bench_vs_torch.py                             # all of benches/cases.json
    venv/bin/python scripts/bench_vs_torch.py --quick                     # the works that matter most, fewer rounds
    venv/bin/python scripts/bench_vs_torch.py --only "conv 3x3" "VAE"     # cases with this in their names
    python3 scripts/bench_vs_torch.py --device cuda --jedi BENCH          # on a GPU: benches/gpu_cases.json, in bf16

Both sides stay alive as processes and only one of them computes at a time. A round is one turn each; a turn repeats the
work for a while and counts with its median; the table shows the median of the rounds. PyTorch computes in f32
with SDPA, without gradients where none are asked for, and in the better of the memory formats (and of the fused or
foreach AdamW). A turn in which something else used the machine is taken again. Peak memory is the most that a process
which does nothing else ever held (VmHWM), libraries included. No weights are needed: they are drawn.

On a GPU the better of eager and compiled is compared, and eager shown beside it; networks that only predict are in bf16, training
is under autocast with f32 parameters, as jedi's is. Peak memory is what the driver says is taken. The machine is not watched.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from bench import gpu, machine, sides

# Turns that may be taken again because of other processes, for each turn that counts.
RETRIES = 3


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the headline cases, three rounds of short turns")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases that have one of these in their names")
    parser.add_argument("--threads", type=int, default=2, help="threads of each side [2]")
    parser.add_argument("--rounds", type=int, help="turns of each side [7, with --quick 3]")
    parser.add_argument("--no-wait", action="store_true", help="measure even though other processes compute")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--jedi", metavar="FILE", help="a bench binary built earlier, to compare versions [built now]")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N [cpu]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    options = parser.parse_args()
    options.is_gpu = options.device != "cpu"
    options.no_wait |= options.is_gpu
    return options


def selected(options):
    path = sides.cases(options.device)
    cases = json.loads(path.read_text())
    if options.only:
        cases = [case for case in cases if any(part in case["name"] for part in options.only)]
    if options.quick:
        cases = [case for case in cases if options.only or case.get("headline")]
    if not cases:
        sys.exit(f"--only {' '.join(options.only)}: no case of {path.name} has this in its name")
    return cases


class Comparison:
    def __init__(self, options, sides_by_name):
        self.options, self.sides = options, sides_by_name
        self.rounds = options.rounds or (3 if options.quick else 7)
        self.turn_seconds = 0.1 if options.quick else 0.25
        self.disturbed = 0

    def turn(self, side, case, times, variant):
        """The median of one turn's runs, in seconds; taken again while others compute."""
        pids = [side.pid for side in self.sides.values()]
        for attempt in range(RETRIES + 1):
            watch = machine.Watch(pids)
            seconds = side.ask(case, times, variant)["seconds"]
            if self.options.no_wait or not watch.is_disturbed():
                return statistics.median(seconds)
            if attempt < RETRIES:
                machine.wait_until_quiet(pids)
        self.disturbed += 1
        return statistics.median(seconds)

    def best_variant(self, side, case):
        """The variant to compare, and how often it fits in a turn."""
        variants, seconds = side.ask(case, 0)["variants"], {}
        for name in variants:
            (once,) = side.ask(case, 1, name)["seconds"]
            again = self.repeats(once) if once < 1 and len(variants) > 1 else 0
            seconds[name] = min([once, *side.ask(case, again, name)["seconds"]] if again else [once])
        best = min(seconds, key=seconds.get)
        return best, self.repeats(seconds[best]), seconds

    def repeats(self, seconds):
        return max(1, min(500, math.ceil(self.turn_seconds / seconds)))

    def compare(self, case):
        row = {"case": case["name"]}
        prepared = {}
        for name, side in self.sides.items():
            try:
                best, times, seconds = self.best_variant(side, case)
                prepared[name] = best, times
                row[name] = {"variant": best, "variants": seconds, "turns": []}
                row["flops"] = side.flops
            except sides.Refused as why:
                row[name] = {"error": str(why).partition("\n")[0]}
        for _ in range(self.rounds):
            for name, (variant, times) in prepared.items():
                row[name]["turns"].append(self.turn(self.sides[name], case, times, variant))
        for name in prepared:
            row[name]["median"] = statistics.median(row[name]["turns"])
        return row


def with_memory(options, case, row, starters):
    """Adds the peak memory of each side in a process of its own."""
    for name, start in starters.items():
        if "error" in row[name]:
            continue
        if options.is_gpu:
            with gpu.Peak(options.device) as peak, start() as side:
                side.ask(case, 1, row[name]["variant"])
            row[name]["peak_bytes"] = peak.bytes
            continue
        with start() as side:
            row[name]["peak_bytes"] = side.ask(case, 1, row[name]["variant"])["peak_bytes"]


def milliseconds(seconds):
    value = seconds * 1e3
    return f"{value:.0f} ms" if value >= 100 else f"{value:.2f} ms" if value >= 1 else f"{value:.3f} ms"


def table(rows, has_memory, is_gpu):
    """A Markdown table; the ratios are PyTorch / jedi, so that more is better for jedi."""
    head = ["work", "PyTorch", "jedi", "PyTorch / jedi", "jedi GFLOP/s"]
    head += ["PyTorch eager"] if is_gpu else []
    head += ["PyTorch peak", "jedi peak", "jedi / PyTorch peak"] if has_memory else []
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for row in rows:
        a, b = row["torch"], row["jedi"]
        cells = [row["case"]] + [milliseconds(s["median"]) if "median" in s else "not done" for s in (a, b)]
        both = "median" in a and "median" in b
        cells.append(f"{a['median'] / b['median']:.2f}" if both else "")
        cells.append(f"{row['flops'] / b['median'] / 1e9:.0f}" if row.get("flops") and "median" in b else "")
        if is_gpu:
            eager = a.get("variants", {}).get("eager")
            cells.append(milliseconds(eager) if eager else "")
        if has_memory:
            peaks = [s.get("peak_bytes") for s in (a, b)]
            cells += [f"{peak / 1e9:.2f} GB" if peak else "" for peak in peaks]
            cells.append(f"{peaks[1] / peaks[0]:.2f}" if all(peaks) else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine_line(options):
    git = ["git", "-C", str(sides.ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown commit"
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "diffusers", "transformers"))
    source = f"jedi {options.jedi}" if options.jedi else f"jedi at {commit}"
    place = gpu.model(options.device) if options.is_gpu else f"{machine.model()}, {options.threads} threads each"
    return f"{place}; {packages}; {source}"


def write_json(options, comparison, rows):
    if options.json:
        facts = {"machine": machine_line(options), "rounds": comparison.rounds, "disturbed": comparison.disturbed}
        options.json.write_text(json.dumps({**facts, "cases": rows}, indent=1) + "\n")


def main():
    options = arguments()
    cases = selected(options)
    binary = options.jedi or sides.build_jedi(features=["cuda"] if options.is_gpu else [])
    starters = {
        "torch": lambda: sides.torch(options.threads, options.device),
        "jedi": lambda: sides.jedi(binary, options.threads, options.device),
    }
    if not options.no_wait:
        machine.wait_until_quiet()
    rows = []
    with starters["torch"]() as torch, starters["jedi"]() as jedi:
        comparison = Comparison(options, {"torch": torch, "jedi": jedi})
        for case in cases:
            row = comparison.compare(case)
            rows.append(row)
            write_json(options, comparison, rows)  # an hour's work is not lost with the last case
            for name in ("torch", "jedi"):
                if "error" in row[name]:
                    print(f"{case['name']}: {name}: {row[name]['error']}", file=sys.stderr)
            print(f"{len(rows)}/{len(cases)} {table([row], False, options.is_gpu).splitlines()[-1]}", file=sys.stderr)
    for case, row in zip(cases, rows):
        if case.get("memory") and not options.no_memory:
            with_memory(options, case, row, starters)
    has_memory = any("peak_bytes" in row[name] for row in rows for name in starters)
    print(machine_line(options))
    print(f"medians of {comparison.rounds} rounds of turns", end="")
    print(", the machine not watched" if options.no_wait else f", {comparison.disturbed} turns disturbed", end="\n\n")
    print(table(rows, has_memory, options.is_gpu))
    write_json(options, comparison, rows)


if __name__ == "__main__":
    main()
