"""Memory of this process on the device that it trains on."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_PROC_STATUS = Path("/proc/self/status")


def memory_gib(device: torch.device | str) -> dict[str, float]:
    """Current and peak memory of this process.

    On CUDA: what torch has allocated on `device`, and its peak since the start or the last
    `torch.cuda.reset_peak_memory_stats`. On the CPU: resident memory of the process, and its peak since the start.

    Returns:
        `memory_gib` and `peak_memory_gib`.
    """
    device = torch.device(device)
    if device.type == "cuda":
        current_bytes, peak_bytes = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    else:
        current_bytes, peak_bytes = _resident_bytes()
    return {"memory_gib": current_bytes / 2**30, "peak_memory_gib": peak_bytes / 2**30}


def _resident_bytes() -> tuple[int, int]:
    """(current, peak) resident memory.

    Linux's own counters are read first: `ru_maxrss` of a process also covers the one that it was forked from, so a
    small rank started by a large launcher would report the launcher's peak.
    """
    if _PROC_STATUS.is_file():
        lines = dict(
            line.split(":", 1) for line in _PROC_STATUS.read_text(encoding="utf-8").splitlines() if ":" in line
        )
        if "VmRSS" in lines and "VmHWM" in lines:
            current, peak = (int(lines[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
            return current, max(current, peak)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak
