"""What the allocator does with the memory of tensors on the CPU: in page faults and resident pages, not time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dmpo_dist.modeling.memory import ONE_ARENA

LONG_ROWS = """
import resource, threading, torch
from dmpo_dist.modeling import memory
cpu = torch.device("cpu")

def rows():
    for _ in range(8):
        kept = [torch.ones(2**22 + 2**21 * i) for i in range(4)]  # 16 to 40 MiB
        del kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    rows()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def measure():
    rows()
    print(faults())
    memory.keep_freed_memory()
    rows()
    print(faults())
    memory.reset_peak(cpu)
    held = memory.held_bytes(cpu)
    rows()
    print((memory.peak_bytes(cpu) - held) >> 20)

if WORKER:
    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()
else:
    measure()
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux's allocator")
@pytest.mark.parametrize("worker", [False, True], ids=["first thread", "thread of a Ray Train worker"])
def test_freed_memory_is_kept_and_a_peak_still_counts_all_of_it(worker):
    environment = os.environ | (ONE_ARENA if worker else {})
    code = LONG_ROWS.replace("WORKER", str(worker))
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    before, after, peak = map(int, out.stdout.split())
    assert after < before / 10
    assert 112 <= peak <= 160  # MiB: what was kept is given back before a peak is measured
