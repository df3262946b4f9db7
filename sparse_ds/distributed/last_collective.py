"""Which collective this rank began last: from torch's flight recorder, which both gloo and nccl write to.

The recorder's functions are private (verified with torch 2.13; `tests/distributed/test_last_collective.py` is the
contract). Where they are missing or answer otherwise, there is no name, and nothing else depends on it.
"""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple

import torch._C._distributed_c10d as c10d

BUFFER_VARIABLE = "TORCH_FR_BUFFER_SIZE"
NUM_RECORDED = 16
"""Collectives that the recorder keeps, unless the user has set BUFFER_VARIABLE. By default it keeps 2000, which take a
third of a second to read; these take less than a millisecond."""
MAX_READABLE = 128
"""With a larger buffer of the user's own the names are not read."""
DUMPS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
"""The recorders of nccl (in builds for CUDA only) and of all others."""


class Collective(NamedTuple):
    """One collective of this rank."""

    number: int
    """How many this rank has begun, this one included."""
    name: str
    """Its name and the elements that go in, like `gloo:all_gather of 1024 Float`."""

    def __str__(self) -> str:
        return f"{self.number} ({self.name})" if self.name else str(self.number)


def keep_few_records() -> None:
    """Make the recorder small; before the first collective of the process."""
    os.environ.setdefault(BUFFER_VARIABLE, str(NUM_RECORDED))


def last_collective() -> Collective:
    """The latest; number 0 where there was none or nothing is known. Takes less than a millisecond, in any thread."""
    latest: dict[str, Any] = {}
    size = os.environ.get(BUFFER_VARIABLE, "")
    if size.isdecimal() and int(size) <= MAX_READABLE:
        for dump in (getattr(c10d, name) for name in DUMPS if hasattr(c10d, name)):
            try:
                entries = json.loads(dump(includeCollectives=True, onlyActive=False)).get("entries", [])
                if entries and entries[-1]["time_created_ns"] > latest.get("time_created_ns", 0):
                    latest = entries[-1]
            except (ValueError, KeyError, TypeError, RuntimeError):
                continue
    if not latest:
        return Collective(0, "")
    sizes, dtypes = latest.get("input_sizes") or [], latest.get("input_dtypes") or []
    name = str(latest.get("profiling_name", ""))
    if sizes and dtypes:
        more = f" and {len(sizes) - 1} more" if len(sizes) > 1 else ""
        name += f" of {'x'.join(map(str, sizes[0])) or 1} {dtypes[0]}{more}"
    return Collective(int(latest["record_id"]) + 1, name)
