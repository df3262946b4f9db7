"""What a command does to logging does not outlast the test."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    names = ("sparse_ds", "sparse_ds.model.find_base_model", "DeepSpeed", "deepspeed", "datasets", "torch.distributed")
    loggers = [logging.getLogger(name) for name in (*names, "accelerate", "bitsandbytes")]
    before = [(each, each.level, each.handlers, each.propagate) for each in loggers]
    yield
    for each, level, handlers, propagate in before:
        each.setLevel(level)
        each.handlers, each.propagate = handlers, propagate
