"""The benchmark of the kernels runs, and finds the crossover that its numbers say."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import bench_kernels
from kernel_operations import DENSE, FORWARD, SAMPLED


def test_every_operation_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tiny sizes."""
    file = tmp_path / "times.json"
    arguments = "--shapes 48x64 --tokens 16 --rounds 2 --densities 0.01 0.2 --optimizer-weights 3000 --dtype float32"
    assert bench_kernels.main([*arguments.split(), "--json", str(file)]) == 0
    times = json.loads(file.read_text())["times"]
    assert all(len(each["ms"]) == 2 and min(each["ms"]) > 0 for each in times)
    names = {each["operation"] for each in times}
    expected = {FORWARD, SAMPLED, DENSE, "deltas put in and taken out", "gradient of 16 x 16 blocks", "SM3"}
    assert expected | {"NF4: dequantize, then put deltas", "AdamW with ages, float32 moments"} <= names
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in names)


def test_crossovers_are_printed_as_the_configuration_takes_them(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--shapes 48x64 --tokens 16 --rounds 2 --crossover --dtype bfloat16"
    assert bench_kernels.main(arguments.split()) == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    assert 0 < json.loads(printed.partition("crossover=")[2].rstrip("'"))["48x64"] <= 1


@pytest.mark.parametrize(
    ("sampled_ms", "expected"),
    [
        (lambda density: 0.5, 0.12),
        (lambda density: 2.0, bench_kernels.NEVER),
        (lambda density: 40 * density, 0.025),
        (None, bench_kernels.NEVER),
    ],
    ids=["always faster", "never", "up to a density", "there is none"],
)
def test_the_crossover_lies_where_both_take_as_long(
    sampled_ms: Callable[[float], float] | None, expected: float
) -> None:
    """Dense 1 ms at every density."""
    times = {(DENSE, density): [1.0, 1.0, 1.0] for density in bench_kernels.CROSSOVER_DENSITIES}
    if sampled_ms is not None:
        times |= {(SAMPLED, density): [sampled_ms(density)] * 3 for density in bench_kernels.CROSSOVER_DENSITIES}
    assert bench_kernels.crossover(times) == pytest.approx(expected)
