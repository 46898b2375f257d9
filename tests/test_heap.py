"""Memory that was freed stays with the process, so that steps cost no page faults."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from pipeline.heap import keep_freed_memory

assert sys.argv[1] == "default" or keep_freed_memory()

def step():
    held = [np.ones((4 << 20) // 8) for _ in range(10)]

thread = ThreadPoolExecutor(1)
for _ in range(3):
    thread.submit(step).result()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread.submit(step).result()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True, timeout=60)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's alone")
def test_a_step_gets_the_memory_of_the_one_before() -> None:
    assert _faults("default") > 1000
    assert _faults("kept") < 100
