"""What else the machine does, and what it is."""

import os
import sys
import time
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
# Of one CPU: what a quiet machine's own services may take.
QUIET = 0.06


def busy_seconds():
    """CPU seconds of all CPUs not idle since the start, those that a hypervisor took away included."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / TICKS


def seconds_of(pid):
    """CPU seconds of a process with all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


class Watch:
    """CPU seconds that processes other than `pids` and this one used since it was made."""

    def __init__(self, pids=()):
        self.pids = [os.getpid(), *pids]
        self.started, self.busy, self.own = time.monotonic(), busy_seconds(), self.own_seconds()

    def own_seconds(self):
        return sum(seconds_of(pid) for pid in self.pids)

    def others(self):
        return busy_seconds() - self.busy - (self.own_seconds() - self.own)

    def is_disturbed(self):
        """The clock ticks in hundredths: short turns are forgiven a few."""
        return self.others() > 0.03 + QUIET * (time.monotonic() - self.started)


def wait_until_quiet(pids=(), limit=3600):
    """Returns once the others used next to nothing for two seconds twice."""
    quiet, started, told = 0, time.monotonic(), 0
    while quiet < 2:
        watch = Watch(pids)
        time.sleep(2)
        used = watch.others() / 2
        quiet = quiet + 1 if used < QUIET else 0
        waited = time.monotonic() - started
        if quiet == 0 and waited > limit:
            sys.exit(f"the machine was not quiet within {limit} s: others compute; stop them, or measure all the same with --no-wait")
        if quiet == 0 and waited > told:
            print(f"waiting for a quiet machine: others use {used:.2f} CPUs", file=sys.stderr)
            told = waited + 30


def model():
    """The CPU as /proc/cpuinfo names it, with what its vector units can."""
    fields = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = fields.get("flags", "").split()
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{fields.get('model name', 'unknown CPU')} ({', '.join(known)})"
