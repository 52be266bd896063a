"""How many cores this process has, and how the threads that compute on them wait for each other.

The latter is read when torch loads its thread pool, so it is set before. Waking a thread takes some 0.05 ms on a
virtual machine, longer than many an operation; one that spins takes the core from the thread that it waits for as soon
as another program wants a core. Figures of both: docs/log.md.
"""

import os
import time
from pathlib import Path

POLICY, SPINS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
TURNS = "5000"
"""Turns that a waiting thread of GNU's OpenMP takes before it sleeps: 0.13 ms on a Zen 4 core (docs/log.md)."""
LOOKS, APART = 3, 0.001
"""How often, and how many seconds apart, the machine is looked at: what runs for an instant is not to count."""


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes() -> int:
    """Return how many processes of this run share the machine: torchrun's, else 1."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def choose_waiting() -> None:
    """Let waiting threads sleep, and spin before that where this process is alone; a policy that is set stays."""
    if POLICY in os.environ:
        return
    os.environ[POLICY] = "passive"
    if alone():
        os.environ.setdefault(SPINS, TURNS)


def alone(load: Path = Path("/proc/loadavg")) -> bool:
    """Whether no other program of this machine wants a core now; False where that cannot be known."""
    try:
        for _ in range(LOOKS):
            running, _, _ = load.read_text().split()[3].partition("/")
            if int(running) == 1:  # this process
                return True
            time.sleep(APART)
    except (OSError, IndexError, ValueError):
        pass
    return False
