"""The memory figures follow what the process does."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sparse_ds.monitor import memory
from sparse_ds.monitor.memory import memory_gib


def test_resident_memory_follows_an_allocation() -> None:
    before = memory_gib("cpu")
    tensor = torch.ones(2**26)  # 0.25 GiB
    during = memory_gib(torch.device("cpu"))
    assert during["memory_gib"] - before["memory_gib"] == pytest.approx(tensor.nbytes / 2**30, abs=0.02)
    del tensor
    after = memory_gib("cpu")
    assert after["memory_gib"] < during["memory_gib"] - 0.2
    # The kernel keeps the counters per core and adds them up now and then: a few MiB may be missing.
    assert after["peak_memory_gib"] >= during["memory_gib"] - 0.02


def test_peak_of_a_child_is_its_own() -> None:
    """`ru_maxrss` of a process started by a large one is at least the large one's."""
    ballast = torch.ones(2**28)  # 1 GiB
    script = "from sparse_ds.monitor.memory import memory_gib; print(memory_gib('cpu')['peak_memory_gib'])"
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 0 < float(child.stdout) < ballast.nbytes / 2**30


def test_without_linux_counters_the_peak_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with_counters = memory_gib("cpu")
    monkeypatch.setattr(memory, "_PROC_STATUS", memory.Path("/nonexistent"))
    without = memory_gib("cpu")
    assert without["memory_gib"] == without["peak_memory_gib"] >= with_counters["peak_memory_gib"] * 0.9


@pytest.mark.gpu
def test_cuda_memory_follows_an_allocation() -> None:
    before = memory_gib("cuda")
    tensor = torch.ones(2**26, device="cuda")
    during = memory_gib("cuda")
    assert during["memory_gib"] - before["memory_gib"] == pytest.approx(0.25)
    del tensor
    assert memory_gib("cuda")["memory_gib"] == before["memory_gib"]
    assert memory_gib("cuda")["peak_memory_gib"] >= during["memory_gib"]
