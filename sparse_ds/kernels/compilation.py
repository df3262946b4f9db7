"""Updates of tensors in place that torch.compile turns into one kernel.

Compiling takes a C++ compiler on CPU and triton on a GPU; the first call costs seconds (about 10 on two cores, about 2
when the machine has compiled the same before). So callers ask for it from a size on that pays for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx.experimental._config as shape_config

_log = logging.getLogger(__name__)


class CompiledUpdate:
    """An in-place update, compiled at its first call for tensors of any size; where that fails, it does nothing, and
    the caller does the same another way.

    Args:
        make: returns the function to compile: of tensors, without other effects, whole in one graph. Called once.
        name: for the message that it cannot be compiled.
    """

    def __init__(self, make: Callable[[], Callable[..., None]], name: str) -> None:
        self._make, self._name = make, name
        self._compiled: Callable[..., None] | None = None
        self.failed = False
        """Whether compiling has failed in this process; it is not tried again."""

    def run(self, *arguments: Any) -> bool:
        """Whether the update was done; if not, nothing has been changed."""
        if self.failed:
            return False
        try:
            if self._compiled is None:
                self._compiled = torch.compile(self._make(), dynamic=True, fullgraph=True)
            with _any_sizes():
                self._compiled(*arguments)
        except Exception as error:  # what a missing or broken compiler raises is not one type
            self.failed = True
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            _log.warning("%s cannot be compiled and runs slower, in plain torch: %s", self._name, reason)
            return False
        return True


@contextmanager
def _any_sizes() -> Iterator[None]:
    """What is compiled within fits all sizes. By default torch takes dimensions that are equal in the first call for
    always equal, and compiles anew for every other pattern, up to its limit."""
    before, shape_config.use_duck_shape = shape_config.use_duck_shape, False
    try:
        yield
    finally:
        shape_config.use_duck_shape = before
