"""keep_freed_memory: what a step frees, the next one gets back."""

import ctypes
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys
import torch
from mnist_lightning.runs.memory import keep_freed_memory

names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
Mallinfo = type("Mallinfo", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in names]})
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Mallinfo

def held():
    return mallinfo().arena + mallinfo().hblkhd

if sys.argv[1] == "kept":
    keep_freed_memory()
before = held()
torch.ones(25_000_000)
print(held() - before)
"""


def held(how: str) -> int:
    """Bytes that malloc of a new process holds on to when a tensor of 100 MB came and went."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


# Not counted in page faults, nor with smaller tensors: glibc keeps those, too, where something small happens to lie
# behind them, and then there are none.
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc from 2.33")
def test_what_a_step_freed_stays_for_the_next() -> None:
    assert held("kept") >= 100_000_000 > held("as it comes")
