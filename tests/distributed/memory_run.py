"""Bytes of tensors: the peak of an action by the CPU allocator, as torch's profiler records it (temporaries inside
operators too), and what is there now."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(action: Callable[[], object]) -> int:
    """The most that `action` holds at one time above what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = action()
    held = peak = 0
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return peak


def live_bytes() -> int:
    """Of all tensors that Python knows, each storage once. (The profiler misses some releases of what was there before
    it began, so a difference of its sums would not do.)"""
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        # Of proxies and of tensors without data nobody may ask for the storage.
        if type(each) in (torch.Tensor, torch.nn.Parameter) and each.device.type == "cpu":
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
