"""PyTorch's side of `bench_data.py`: the same shards through `webdataset` and a DataLoader with worker processes.

    python -m bench.webdataset_side SHARDS --workers 2 --where worker|main

Each line on stdin is a turn of so many seconds; the answer is a JSON line. A worker opens the JPEG with Pillow (libjpeg-turbo),
cuts the strip into its squares and batches them; they become floats in the worker (`--where worker`), or after they
came to the main process as bytes, which is a quarter of the way (`--where main`).
"""

import argparse
import json
import sys
import time

import numpy
import torch
import webdataset


def squares(sample, floats):
    """[n, 3, h, w] of a strip of n squares."""
    strip = numpy.asarray(sample["jpg"].convert("RGB"))
    n = strip.shape[0] // strip.shape[1]
    pictures = torch.from_numpy(strip.reshape(n, strip.shape[1], strip.shape[1], 3).copy()).permute(0, 3, 1, 2)
    captions = sample["txt"].split("<|split|>")
    assert len(captions) == n
    return (normalised(pictures) if floats else pictures.contiguous()), captions


def normalised(pictures):
    return pictures.float().div_(127.5).sub_(1.0)


def collated(samples):
    return torch.cat([pictures for pictures, _ in samples]), [c for _, captions in samples for c in captions]


def loader(options):
    floats = options.where == "worker"
    dataset = webdataset.WebDataset(
        options.shards, resampled=True, shardshuffle=False, nodesplitter=None, seed=0, handler=webdataset.reraise_exception
    )
    dataset = dataset.shuffle(100, initial=1).decode("pil").map(lambda sample: squares(sample, floats))
    dataset = dataset.batched(options.batch // options.images, collation_fn=collated)
    return webdataset.WebLoader(dataset, batch_size=None, num_workers=options.workers, prefetch_factor=4)


def turn(options, seconds):
    """Images in about so many seconds; the workers' start is not counted."""
    batches = iter(loader(options))
    next(batches)
    started, images = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        pictures, _ = next(batches)
        if options.where == "main":
            pictures = normalised(pictures)
        assert pictures.shape[0] == options.batch
        images += options.batch
    return {"images": images, "seconds": time.monotonic() - started}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--where", choices=["worker", "main"], default="main")
    options = parser.parse_args()
    torch.set_num_threads(1 if options.where == "worker" else 2)
    for line in sys.stdin:
        print(json.dumps(turn(options, float(line))), flush=True)


if __name__ == "__main__":
    main()
