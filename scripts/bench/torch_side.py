"""PyTorch's side: answers requests on stdin as `benches/speed/serve.rs` does, whose protocol it shares.

`{"case": NAME, "times": K, "variant": V, "trim": BOOL}` → `{"seconds": […], "variants": […], "peak_bytes": B}` or
`{"error": TEXT}`. Without a variant the first one runs."""

import argparse
import ctypes
import gc
import json
import sys
from pathlib import Path

import torch

from . import place, sides, torch_operations

OPERATIONS = {"conv", "attention", "group_norm", "layer_norm", "geglu", "linear", "upsample", "adamw"}


def variants_of(case):
    if case["op"] in OPERATIONS:
        return getattr(torch_operations, case["op"])(case)
    from . import torch_networks  # seconds and 200 MB, which operations need not pay

    return getattr(torch_networks, case["op"])(case)


def trim():
    """Freed memory goes back to the system: jedi's side needs it."""
    gc.collect()
    if place.is_gpu():
        torch.cuda.empty_cache()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass  # another libc, which has its own way


def peak_bytes():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


class Server:
    def __init__(self):
        self.cases = {case["name"]: case for case in json.loads(sides.cases(place.device).read_text())}
        self.name, self.variants, self.warm = None, {}, None

    def answer(self, request):
        trims = request.get("trim", False)
        if request["case"] != self.name:
            self.name, self.variants, self.warm = None, {}, None
            trim()
            torch.manual_seed(0)
            self.variants = variants_of(self.cases[request["case"]])
            self.name = request["case"]
        variant = request.get("variant") or next(iter(self.variants))
        run = self.variants[variant]
        if trims or self.warm != variant:
            run()
            self.warm = variant
        seconds = [run() for _ in range(request["times"])]
        if trims:
            trim()
        return {"seconds": seconds, "variants": list(self.variants), "peak_bytes": peak_bytes()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    place.settle(options.device)
    server = Server()
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints must not look like an answer
    for line in sys.stdin:
        try:
            answer = server.answer(json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
