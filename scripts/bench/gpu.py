"""What a GPU is, and how much of its memory is taken, as its driver tells."""

import subprocess
import threading


def query(device, fields):
    """`nvidia-smi --query-gpu` for `cuda` or `cuda:N`."""
    index = device.partition(":")[2] or "0"
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def model(device):
    return "{}, driver {}, {} MiB".format(*(part.strip() for part in query(device, "name,driver_version,memory.total").split(",")))


class Peak:
    """The most memory taken while it is open, beyond what was taken before: of all processes, so let only one run."""

    def __init__(self, device):
        self.device = device

    def used_bytes(self):
        return int(query(self.device, "memory.used")) * 2**20

    def watch(self):
        while not self.closed.wait(0.05):
            self.peak = max(self.peak, self.used_bytes())

    def __enter__(self):
        self.before = self.peak = self.used_bytes()
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.closed.set()
        self.thread.join()

    @property
    def bytes(self):
        return self.peak - self.before
