#!/usr/bin/env python3
"""`jedi sample` at 512×512 with a model of Stable Diffusion 1.4's size: peak memory, and photographs of every kind.

    python3 -m venv venv && venv/bin/pip install torch==2.15.0 diffusers==0.36.0 transformers==4.57.6 accelerate pillow
    cargo build --release && venv/bin/python scripts/check_photographs.py PHOTO PHOTO PHOTO     # 8 GB of disk, ten minutes

The weights are random (float32), so the pictures show nothing; every path is taken. Three references under joint guidance come
first, as they are and with --low-memory; their peak must stay below 8 GiB. Then the first photograph as a reference in
each of the formats that cameras and programs write. Exits with 1 if a figure or a kind of picture fails.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from diffusers.utils import logging
from PIL import Image

from check_models import Model, layouts, remove, write_folder

MOST_GIB = 8
ORIENTATION = 0x0112


def run(jedi, *arguments):
    """Exit code, messages, seconds, and the peak that the kernel counted for the process, in GiB."""
    with tempfile.TemporaryFile("w+") as log:
        started = time.monotonic()
        command = [jedi, *map(str, arguments)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        log.seek(0)
        return os.waitstatus_to_exitcode(status), log.read(), time.monotonic() - started, usage.ru_maxrss / 2**20


def kinds(photo, room):
    """Name and file of the photograph in each format."""
    picture = Image.open(photo).convert("RGB")

    def saved(name, image, **settings):
        image.save(room / name, **settings)
        return room / name

    exif = Image.Exif()
    exif[ORIENTATION] = 6
    yield "JPEG", saved("plain.jpg", picture)
    yield "JPEG, turned by EXIF", saved("turned.jpg", picture.transpose(Image.Transpose.ROTATE_90), exif=exif)
    yield "JPEG, grey", saved("grey.jpg", picture.convert("L"))
    yield "JPEG, CMYK", saved("cmyk.jpg", picture.convert("CMYK"))
    yield "JPEG, progressive", saved("progressive.jpg", picture, progressive=True)
    yield "PNG, RGBA", saved("alpha.png", picture.convert("RGBA"))
    yield "PNG, palette", saved("palette.png", picture.convert("P"))
    yield "PNG, 16-bit grey", saved("deep.png", picture.convert("I;16" if "I;16" in Image.MODES else "I"))
    yield "WebP", saved("photo.webp", picture)
    yield "JPEG, 8192×8192", saved("huge.jpg", picture.resize((8192, 8192)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs=3, type=Path, metavar="PHOTO")
    parser.add_argument("--jedi", default=Path(__file__).parents[1] / "target" / "release" / "jedi", type=Path)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    failed = False
    with tempfile.TemporaryDirectory() as room:
        room = Path(room)
        model = Model("SD1.4", layouts.SD1, layouts.VAE, [layouts.CLIP_L], "clip", 4, "epsilon", 64)
        plain = write_folder(model, room / "plain")
        del model
        code, log, _, _ = run(arguments.jedi, "convert", "--model", plain, "--out", room / "joint", "--joint")
        if code != 0:
            sys.exit(log)
        remove(plain)

        def sample(steps, references, *flags):
            references = [flag for path in references for flag in ("--ref", path)]
            return run(
                arguments.jedi, "sample", "--device", "cpu", "--model", room / "joint", "--prompt", "a photo of the dog in the snow",
                "--steps", steps, "--out", room / "out.png", *references, *flags,
            )

        def is_painted():
            with Image.open(room / "out.png") as picture:
                return picture.size == (512, 512)

        print(f"{'three references, joint guidance':<40} {'GiB':>6} {'s':>6}")
        for name, flags in [("as it is", []), ("--low-memory", ["--low-memory"])]:
            code, log, seconds, peak = sample(2, arguments.photos, *flags)
            good = code == 0 and is_painted() and peak < MOST_GIB
            failed |= not good
            print(f"{name:<40} {peak:6.2f} {seconds:6.0f}", "" if good else f"FAILED {log[-400:]}", flush=True)
            remove(room / "out.png")
        print(f"\n{'one reference':<40} {'GiB':>6} {'s':>6}")
        for name, path in kinds(arguments.photos[0], room):
            code, log, seconds, peak = sample(1, [path], "--guidance", "text-only", "--scale", 1)
            good = code == 0 and is_painted()
            failed |= not good
            print(f"{name:<40} {peak:6.2f} {seconds:6.0f}", "" if good else f"FAILED {log[-400:]}", flush=True)
            remove(room / "out.png")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
