"""Rows timed in turns, A B C A B C, so that whatever else the machine does hits all of them alike; tables of them.

A ratio is the median of the ratios within the rounds, so a slow round changes nothing. Times are wall clock, in ms;
processor time of the process is kept beside it, for machines that are busy with other things.
"""

from __future__ import annotations

import gc
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_rows import ESTIMATION, EVENT, FIRST_ESTIMATION, STEP, Batch, Row

LABELS = {
    "floor": "frozen floor",
    "sparta": "SpaRTA",
    "sft_ag": "SFT-AG",
    "sft_ma": "SFT-MA",
    "sparta_compiled": "SpaRTA, `train.compile`",
    "lora_0": "LoRA",
    "lora_0.1": "LoRA, dropout 0.1",
    "dora": "DoRA",
    "shira": "SHiRA",
    "supertuning": "supertuning",
    "full": "full",
}
INTERVAL_STEPS, ESTIMATION_STEPS = 20, 5
"""S and gamma, by which estimation and events are shared out over the steps."""
PARTS = {STEP: "an ordinary step", FIRST_ESTIMATION: "first estimation step", ESTIMATION: "a later one", EVENT: "event"}


class Timed(NamedTuple):
    """What was measured of one row: by part, one number per round."""

    name: str
    density: float | None
    num_trained: int
    wall_ms: dict[str, list[float]]
    cpu_ms: dict[str, list[float]]

    def on_cpu_clock(self) -> Timed:
        """The same with processor time in the place of the wall clock."""
        return self._replace(wall_ms=self.cpu_ms)

    def whole_step_ms(self) -> list[float]:
        """Per round: a step with its share of estimation and events."""
        if set(self.wall_ms) == {STEP}:
            return self.wall_ms[STEP]
        return [self._shared(number) for number in range(len(self.wall_ms[STEP]))]

    def _shared(self, number: int) -> float:
        ms = {part: times[number] for part, times in self.wall_ms.items()}
        extra = ms.get(EVENT, 0.0)
        if ESTIMATION in ms:
            extra += ms[FIRST_ESTIMATION] - ms[STEP] + (ESTIMATION_STEPS - 1) * (ms[ESTIMATION] - ms[STEP])
        return ms[STEP] + extra / INTERVAL_STEPS


def time_in_turns(
    rows: Sequence[Row],
    batch: Batch,
    rounds: int,
    *,
    synchronize: Callable[[], None] = lambda: None,
    num_warmup_rounds: int = 1,
) -> list[Timed]:
    """All rows, one after the other, `rounds` times, in an order that rotates.

    Args:
        rows: ready to step.
        batch: what they step on.
        rounds: that are counted.
        synchronize: wait for the device, or for the other ranks.
        num_warmup_rounds: that are not counted.
    """
    timed = [Timed(row.name, row.density, row.num_trained, {}, {}) for row in rows]
    gc.collect()
    gc.disable()
    try:
        for number in range(num_warmup_rounds + rounds):
            shift = number % len(rows)
            for row, times in [*zip(rows, timed, strict=True)][shift:] + [*zip(rows, timed, strict=True)][:shift]:
                for part, action in row.measured(batch).items():
                    synchronize()
                    begin, begin_cpu = time.perf_counter(), time.process_time()
                    action()
                    synchronize()
                    if number >= num_warmup_rounds:
                        times.wall_ms.setdefault(part, []).append(1e3 * (time.perf_counter() - begin))
                        times.cpu_ms.setdefault(part, []).append(1e3 * (time.process_time() - begin_cpu))
            gc.collect()
    finally:
        gc.enable()
    return timed


def table(timed: Sequence[Timed]) -> str:
    """Markdown, a block of lines for each density; ratios to the floor and to LoRA where they are there."""
    lines = [
        "| density | row | trained weights | ms | x floor | x LoRA 0.1 | fastest to slowest, ms |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    floor = next((each for each in timed if each.name == "floor"), None)
    densities = sorted({each.density for each in timed if each.density is not None})
    alone = [each for each in timed if each.density is None]
    for each in alone:
        lines.append(_line(each, LABELS[each.name], each.whole_step_ms(), floor, None))
    for density in densities:
        of_density = [each for each in timed if each.density == density]
        lora = next((each for each in of_density if each.name == "lora_0.1"), None)
        for each in of_density:
            label = LABELS[each.name]
            if len(each.wall_ms) == 1:
                lines.append(_line(each, label, each.wall_ms[STEP], floor, lora))
                continue
            lines.append(_line(each, f"{label}, all included", each.whole_step_ms(), floor, lora))
            lines += [
                _line(each, f"{label}: {PARTS[part]}", times, floor, lora) for part, times in each.wall_ms.items()
            ]
    return "\n".join(lines)


def _line(each: Timed, label: str, times: Sequence[float], floor: Timed | None, lora: Timed | None) -> str:
    density = "" if each.density is None else f"{100 * each.density:g} %"
    return (
        f"| {density} | {label} | {each.num_trained:,} | {statistics.median(times):.1f} | {_ratio(times, floor)} | "
        f"{_ratio(times, lora)} | {min(times):.1f} to {max(times):.1f} |"
    )


def _ratio(times: Sequence[float], other: Timed | None) -> str:
    if other is None:
        return ""
    return f"{statistics.median(one / two for one, two in zip(times, other.whole_step_ms(), strict=True)):.2f}"


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    found: dict[str, Any] = {
        name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "deepspeed")
    }
    if device.type == "cuda":
        found |= {"device": torch.cuda.get_device_name(device), "triton": version("triton")}
    else:
        found |= {
            "device": _processor(),
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "c++ compiler": shutil.which("g++") is not None,
        }
    return found


def machine_line(machine: dict[str, Any]) -> str:
    """`describe_machine` as one line."""
    return ", ".join(f"{name} {value}" for name, value in machine.items())


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()
