"""keep_freed_memory: what a step frees, the next one gets back."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from mnist_lightning.memory import keep_freed_memory

def step():
    [torch.ones(2**21) for _ in range(16)]  # 8 MB each, all alive at once, as ConvNet's activations are

if sys.argv[1] == "kept":
    keep_freed_memory()
torch.set_num_threads(1)
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def new_pages(how: str) -> int:
    """Pages that the kernel had to clear in 20 steps of a new process."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library isn't glibc: nothing is set")
def test_steps_get_the_same_pages_again() -> None:
    assert new_pages("kept") < 100 < new_pages("as it comes")
