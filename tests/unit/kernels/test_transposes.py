"""Transposed copies are exact, compiled or not, and a machine that cannot compile does without."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch

from sparse_ds.kernels import transposes
from sparse_ds.kernels.compilation import CompiledOrEager


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compiled_copies_are_exact(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that vectors and tiles do not divide; the patterns include NaN, infinities and -0."""
    monkeypatch.setattr(transposes, "MIN_COMPILED_ELEMENTS", 2)
    compiled = transposes._transpose_compiled
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    limits = torch.iinfo(bits)
    for shape in ((70, 33), (64, 64), (1, 17), (19, 1), (3, 130)):
        matrix = torch.randint(limits.min, limits.max, shape, dtype=bits).view(dtype)
        result = transposes.transposed(matrix)
        assert result.is_contiguous() and result.shape == (shape[1], shape[0])
        assert torch.equal(result.view(bits), matrix.view(bits).t())
    assert compiled._compiled is not None, "nothing was compiled"


def test_small_and_strided_matrices_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(matrix: torch.Tensor) -> torch.Tensor:
        raise AssertionError("compiled")

    monkeypatch.setattr(transposes, "_transpose_compiled", fail)
    wide = torch.randn(1024, 2048)
    for matrix in (torch.randn(3, 5), wide[:, ::2], wide.t(), torch.ones(()).expand(2048, 2048)):
        result = transposes.transposed(matrix)
        assert result.is_contiguous() and torch.equal(result, matrix.t())


def test_without_a_compiler_it_runs_eagerly_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setattr("torch._inductor.config.fx_graph_cache", False)
    monkeypatch.setattr(logging.getLogger("sparse_ds"), "propagate", True)

    def doubled(tensor: torch.Tensor) -> torch.Tensor:
        return tensor * 2

    function = CompiledOrEager(doubled)
    for _ in range(3):
        assert torch.equal(function(torch.arange(6.0)), torch.arange(0.0, 12.0, 2.0))
    messages = [record.message for record in caplog.records if "is not compiled" in record.message]
    assert len(messages) == 1 and messages[0].startswith("doubled")


def test_an_error_of_the_function_itself_comes_out() -> None:
    def failing(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(7)

    with pytest.raises(RuntimeError, match="shape"):
        CompiledOrEager(failing)(torch.arange(6.0))
