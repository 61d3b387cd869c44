"""Memory that is freed and taken again costs no page faults."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
from router_tuning.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
import torch
torch.set_num_threads(1)
x, faults = torch.ones(500, 20_000, dtype=torch.bfloat16), []
for _ in range(30):
    x.float().log_softmax(-1).sum()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[9])
"""
MALLOC = ("MALLOC_", "GLIBC_", "LD_PRELOAD")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt(3) is glibc's")
@pytest.mark.parametrize(
    ("word", "environment", "few"),
    [("keep", {}, True), ("leave", {}, False), ("keep", {"MALLOC_MMAP_THRESHOLD_": "131072"}, False)],
)
def test_pages_are_taken_once(word: str, environment: dict[str, str], few: bool) -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith(MALLOC)}
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, word], env=own | environment, capture_output=True, text=True, check=True
    )
    faults = int(found.stdout)  # of twenty times two blocks of 40 MB, 10,000 pages each
    assert faults < 50_000 if few else faults > 150_000
