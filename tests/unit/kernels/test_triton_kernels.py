"""The cases of triton_cases.py in Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparse_ds.kernels import triton_kernels

CASES = Path(__file__).with_name("triton_cases.py")


def run_cases(interpret: str) -> None:
    """In a process of its own: triton decides at its import whether it interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(CASES)]
    environment = os.environ | {"TRITON_INTERPRET": interpret}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


def test_kernels_in_the_interpreter() -> None:
    run_cases("1")


@pytest.mark.gpu
def test_kernels_on_the_gpu() -> None:
    run_cases("0")


def test_without_a_gpu_they_are_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not triton_kernels.available(torch.zeros(1))


@pytest.mark.parametrize(
    ("block", "supported"),
    [((16, 16), True), ((1, 16), True), ((64, 64), True), ((1, 1), False), ((16, 4), False), ((12, 16), False)],
)
def test_supported_blocks(block: tuple[int, int], supported: bool) -> None:
    assert triton_kernels.supports_block(*block) is supported
