"""In a process of its own: the C library is told how to give out memory for as long as that lives."""

import subprocess
import sys

import pytest

PROGRAM = """
import re
from pathlib import Path
import numpy as np
from diffusion.heap import keep_large_apart

def anonymous_mib():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

np.ones(30 * 2**17)  # freed at once: from here on glibc takes arrays of up to 30 MiB from its heap
if {apart}:
    keep_large_apart()
before = anonymous_mib()
large, small = [], []
for _ in range(4):
    large.append(np.ones(13 * 2**17))
    small.append(np.ones(2**13))
del large
print(anonymous_mib() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library's own ways")
def test_freed_arrays_between_others_are_the_systems_again() -> None:
    def kept_mib(*, apart: bool) -> float:
        program = PROGRAM.format(apart=apart)
        return float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)

    assert kept_mib(apart=True) < 5
    assert kept_mib(apart=False) > 30, "the C library does not do this any more: neither need we"
