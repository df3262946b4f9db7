"""Options of speed that exclude each other, or the place of the run."""

from __future__ import annotations

from typing import Any

import pytest

from sparse_ds.config import RunConfig


def load(model: dict[str, Any], train: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(
        {"model": model, "optimizer": {"learning_rate": 0.1}, "train": {"output_dir": "run", **train}}
    )


def test_liger_kernels_need_a_gpu() -> None:
    with pytest.raises(ValueError, match=r"model\.liger_kernels: got true, but these kernels need a GPU"):
        load({"liger_kernels": True}, {"device": "cpu"})
    assert load({"liger_kernels": True}, {}).model.liger_kernels


def test_one_of_two() -> None:
    with pytest.raises(ValueError, match=r"train\.compile: got true together with model\.liger_kernels"):
        load({"liger_kernels": True}, {"compile": True})
    assert load({}, {"compile": True, "device": "cpu"}).train.compile
