"""Transposed copies are exact, compiled or not, and a machine that cannot compile does without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparse_ds.kernels import transposes
from sparse_ds.kernels.compilation import CompiledUpdate


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compiled_copies_are_exact(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that vectors and tiles do not divide; the patterns include NaN, infinities and -0."""
    monkeypatch.setattr(transposes, "MIN_COMPILED_ELEMENTS", 2)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    limits = torch.iinfo(bits)
    for shape in ((70, 33), (64, 64), (19, 3), (3, 130)):
        matrix = torch.randint(limits.min, limits.max, shape, dtype=bits).view(dtype)
        result = transposes.transposed(matrix)
        assert result.is_contiguous() and result.shape == (shape[1], shape[0])
        assert torch.equal(result.view(bits), matrix.view(bits).t())
    assert not transposes._compiled.failed and transposes._compiled._compiled is not None


def test_small_and_strided_matrices_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> Callable[..., None]:
        raise AssertionError("compiled")

    monkeypatch.setattr(transposes, "_compiled", CompiledUpdate(make, "the transpose"))
    wide = torch.randn(1024, 2048)
    for matrix in (torch.randn(3, 5), wide[:, ::2], wide.t(), torch.ones(()).expand(2048, 2048)):
        result = transposes.transposed(matrix)
        assert result.is_contiguous() and torch.equal(result, matrix.t())
    assert not transposes._compiled.failed


WITHOUT_A_COMPILER = """
import torch
from sparse_ds.kernels import transposes
matrix = torch.randn(1024, 1025)
for _ in range(3):
    assert torch.equal(transposes.transposed(matrix), matrix.t())
assert transposes._compiled.failed
"""


def test_without_a_compiler_it_runs_eagerly_and_says_so_once(tmp_path: Path) -> None:
    """In a process of its own: inductor keeps what it has found out about the compiler."""
    environment = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", WITHOUT_A_COMPILER]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("the transpose of activations cannot be compiled and runs slower") == 1
