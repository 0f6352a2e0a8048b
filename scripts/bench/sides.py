"""The two programs that are compared, each a child process that computes only while it is asked."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS", "CANDLE_NUM_THREADS")


class Refused(Exception):
    """A side cannot do a case; the text says why."""


class Side:
    def __init__(self, command, threads):
        environment = {**os.environ, **{name: str(threads) for name in THREADS}}
        environment["RUST_BACKTRACE"] = "0"  # it would fill the message of a case that jedi refuses
        environment["PYTHONPATH"] = str(ROOT / "scripts")
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.flops = None  # of the case asked for last, where the side counts them
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)

    @property
    def pid(self):
        return self.process.pid

    def ask(self, case, times, variant=None):
        request = {"case": case["name"], "times": times, "variant": variant, "trim": case.get("heavy", False)}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise Refused(f"the process ended with {self.process.wait()} (memory?)")
        answer = json.loads(line)
        if "error" in answer:
            raise Refused(answer["error"])
        self.flops = answer.get("flops")
        return answer

    def close(self):
        self.process.stdin.close()
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def cases(device):
    """What is measured on `cpu`, `cuda` or `cuda:N`."""
    return ROOT / "benches" / ("cases.json" if device == "cpu" else "gpu_cases.json")


def build_jedi(bench="speed", features=()):
    """A bench binary of this checkout."""
    command = ["cargo", "bench", "--locked", "--bench", bench, "--no-run", "--message-format=json"]
    command += [f"--features={','.join(features)}"] if features else []
    built = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    for line in built.stdout.splitlines():
        message = json.loads(line)
        if message.get("target", {}).get("name") == bench and message.get("executable"):
            return message["executable"]
    sys.exit(f"cargo bench: told of no executable for the bench `{bench}`")


def jedi(binary, threads, device="cpu"):
    return Side([binary, "--serve", "--device", device], threads)


def torch(threads, device="cpu"):
    command = [sys.executable, "-m", "bench.torch_side", "--threads", str(threads), "--device", device]
    return Side(command, threads)
