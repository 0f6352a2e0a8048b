#!/usr/bin/env python3
"""Compares data loading alone: jedi against PyTorch with `webdataset`, on the same shards of JPEG strips, in turns.

    python3 -m venv venv && venv/bin/pip install torch==2.15.0 webdataset pillow numpy
    venv/bin/python scripts/bench_data.py                    # 512 pixels, two workers each, on two cores

Both read strips of three square pictures with captions from tars, decode, cut, and hand batches of 24 pictures as f32 in [-1, 1]
to one consumer. Pictures are drawn (noise whose spectrum falls as that of photographs) and saved with Pillow's quality 90.
The table shows the median of the rounds; PyTorch counts with the better of two ways to hand its batches over.
"""

import argparse
import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path

import numpy
from PIL import Image

from bench import machine, sides

ROOT = Path(__file__).parents[1]
IMAGES = 3  # of a set


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="side of the pictures [512]")
    parser.add_argument("--sets", type=int, default=256, help="sets in the shards [256]")
    parser.add_argument("--shards", type=int, default=4, help="[4]")
    parser.add_argument("--workers", type=int, default=2, help="of each side [2]")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a turn [5]")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side [5]")
    parser.add_argument("--no-wait", action="store_true", help="measure even though other processes compute")
    parser.add_argument("--jedi", metavar="FILE", help="a bench binary built earlier [built now]")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="make the shards here, or take those that are there")
    return parser.parse_args()


def strip(rng, size):
    """A strip of pictures with a spectrum of amplitudes 1/f, and colours that go together."""
    height, width = IMAGES * size, size
    frequency = numpy.hypot(numpy.fft.fftfreq(height)[:, None], numpy.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1

    def noise():
        return rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)

    shared, channels = noise(), []
    for _ in range(3):
        values = numpy.fft.irfft2((shared + 0.3 * noise()) / frequency**1.2, s=(height, width))
        channels.append(numpy.clip(128 + 55 * (values - values.mean()) / values.std(), 0, 255))
    jpeg = io.BytesIO()
    Image.fromarray(numpy.stack(channels, -1).astype(numpy.uint8)).save(jpeg, "JPEG", quality=90)
    return jpeg.getvalue()


def make_shards(folder, options):
    rng, per_shard, n_bytes = numpy.random.default_rng(0), options.sets // options.shards, []
    captions = "<|split|>".join(f"a photo of a thing, view {n}" for n in range(IMAGES)).encode()
    for shard in range(options.shards):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for number in range(shard * per_shard, (shard + 1) * per_shard):
                jpeg = strip(rng, options.size)
                n_bytes.append(len(jpeg))
                for ending, data in (("jpg", jpeg), ("txt", captions)):
                    member = tarfile.TarInfo(f"{number:08}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    print(f"{len(n_bytes)} strips of {IMAGES}, {statistics.mean(n_bytes) / 1e3:.0f} kB each", file=sys.stderr)


class Side:
    def __init__(self, command):
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process, self.rates = subprocess.Popen(command, cwd=ROOT / "scripts", **pipes), []

    def turn(self, seconds):
        """Images a second."""
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{' '.join(map(str, self.process.args))}: ended with {self.process.wait()}")
        answer = json.loads(line)
        return answer["images"] / answer["seconds"]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def compare(options, folder):
    pattern = str(folder / f"{{00000..{options.shards - 1:05}}}.tar")
    common = ["--workers", str(options.workers), "--images", str(IMAGES)]
    torch = [sys.executable, "-m", "bench.webdataset_side", pattern, *common]
    binary = options.jedi or sides.build_jedi("data")
    taking_turns = {
        "PyTorch, bytes to the main process": Side([*torch, "--where", "main"]),
        "PyTorch, floats in the workers": Side([*torch, "--where", "worker"]),
        "jedi": Side([binary, "--serve", "--source", pattern, "--size", str(options.size), *common]),
    }
    for side in taking_turns.values():
        side.turn(1.0)
    for _ in range(options.rounds):
        for side in taking_turns.values():
            if not options.no_wait:
                machine.wait_until_quiet()
            side.rates.append(side.turn(options.seconds))
    for side in taking_turns.values():
        side.close()
    return {name: statistics.median(side.rates) for name, side in taking_turns.items()}


def main():
    options = arguments()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "00000.tar").exists():
            make_shards(folder, options)
        rates = compare(options, folder)
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "webdataset", "pillow"))
    print(f"{machine.model()}, {options.workers} workers each; {packages}; {options.size} pixels, strips of {IMAGES}")
    print(f"medians of {options.rounds} turns of {options.seconds:g} s{', the machine not watched' if options.no_wait else ''}\n")
    for name, rate in rates.items():
        print(f"{name:<40}{rate:8.1f} images/s")
    best = max(rate for name, rate in rates.items() if name != "jedi")
    print(f"{'jedi / PyTorch':<40}{rates['jedi'] / best:8.2f}")


if __name__ == "__main__":
    main()
