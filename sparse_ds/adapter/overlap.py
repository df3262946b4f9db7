"""How much adapters of one base get in each other's way: shared indices, opposite signs, weight of the shared part.

For two adapters A and B, over all matrices:

    both             |A n B|, the indices that both have; as a share of A, of B, and of the union (Jaccard)
    by chance        sum over matrices of K_A K_B / N: what two independent random sets of their sizes share on average
    sign conflicts   the shared indices whose two values have opposite signs (0 has none)
    energy           sum over the shared indices of (a + b)^2, as a share of the same sum over the union: how much of
                     the summed adapter lies where both are

and the same for all adapters together, where "shared" is: by at least two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from sparse_ds.adapter.adapter import Adapter
from sparse_ds.adapter.aligned import AlignedChunk, aligned_chunks
from sparse_ds.adapter.same_base import check_same_base
from sparse_ds.config.errors import UserError


@dataclass
class SharedCounts:
    """What a set of adapters has in common. The fractions are 0 where there is nothing to divide by."""

    num_union: int = 0
    """Indices that at least one of them has."""
    num_shared: int = 0
    """Indices that at least two of them have."""
    num_shared_by_chance: float = 0.0
    """What independent random sets of the same sizes would share on average."""
    num_sign_conflicts: int = 0
    """Shared indices at which two values have opposite signs."""
    energy: float = 0.0
    """Sum of the squares of the summed adapter."""
    shared_energy: float = 0.0
    """The part of it at shared indices."""

    @property
    def jaccard(self) -> float:
        """Shared / union."""
        return _ratio(self.num_shared, self.num_union)

    @property
    def conflict_fraction(self) -> float:
        """Sign conflicts / shared."""
        return _ratio(self.num_sign_conflicts, self.num_shared)

    @property
    def energy_fraction(self) -> float:
        """The share of the summed adapter's energy that lies at shared indices."""
        return _ratio(self.shared_energy, self.energy)

    def to_dict(self) -> dict[str, Any]:
        """Counts and fractions, for JSON."""
        names = ("jaccard", "conflict_fraction", "energy_fraction")
        return {**asdict(self), **{name: getattr(self, name) for name in names}}

    def add(self, chunk: AlignedChunk, rows: Sequence[int]) -> Tensor:
        """Take in the rows of `chunk` that are those of these adapters.

        Returns:
            [U] int64: how many of them have the index.
        """
        num_present_U = torch.zeros_like(chunk.indices, dtype=torch.int64)
        has_positive_U, has_negative_U = torch.zeros(2, chunk.indices.numel(), dtype=torch.bool)
        sum_U = torch.zeros_like(chunk.values[0])
        # Row by row: reductions over a first dimension of two or three are many times slower.
        for row in rows:
            num_present_U += chunk.present[row]
            has_positive_U |= chunk.values[row] > 0
            has_negative_U |= chunk.values[row] < 0
            sum_U += chunk.values[row]
        is_shared_U = num_present_U > 1
        shared_sum_U = sum_U[is_shared_U]
        self.num_union += int(num_present_U.count_nonzero())
        self.num_shared += shared_sum_U.numel()
        self.num_sign_conflicts += int((has_positive_U & has_negative_U).sum())
        self.energy += float(sum_U.dot(sum_U))
        self.shared_energy += float(shared_sum_U.dot(shared_sum_U))
        return num_present_U


@dataclass
class OverlapReport:
    """`overlap` of several adapters."""

    names: list[str]
    """Of the adapters, in the given order: the folders, unless other names were given."""
    num_active: list[int]
    """K of each adapter, over all its modules."""
    num_shared_by: list[int]
    """Number of indices that exactly 1, 2, ... adapters have."""
    in_all: SharedCounts
    """Of all adapters together."""
    pairs: dict[tuple[int, int], SharedCounts] = field(default_factory=dict)
    """(first, second) -> what these two have in common; numbers count from 0, first < second."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "adapters": [
                {"name": name, "num_active": num_active}
                for name, num_active in zip(self.names, self.num_active, strict=True)
            ],
            "pairs": [
                {
                    "first": first,
                    "second": second,
                    "fraction_of_first": _ratio(counts.num_shared, self.num_active[first]),
                    "fraction_of_second": _ratio(counts.num_shared, self.num_active[second]),
                    **counts.to_dict(),
                }
                for (first, second), counts in self.pairs.items()
            ],
            "in_all": {"num_shared_by": self.num_shared_by, **self.in_all.to_dict()},
        }

    def table(self) -> str:
        """Plain text: the adapters by number, then one row for each pair and one for all of them."""
        lines = [
            f"{number:>3}  {num_active:>13,} deltas  {name}"
            for number, (name, num_active) in enumerate(zip(self.names, self.num_active, strict=True))
        ]
        header = ("A, B", "shared", "by chance", "of A", "of B", "of union", "conflicts", "energy")
        rows: list[tuple[str, ...]] = [header]
        for (first, second), counts in self.pairs.items():
            shares = [_percent(_ratio(counts.num_shared, self.num_active[number])) for number in (first, second)]
            rows.append(_row(f"{first}, {second}", counts, *shares))
        if len(self.names) > 2:
            rows.append(_row("all", self.in_all, "-", "-"))
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines += ["", *("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)]
        return "\n".join(
            [
                *lines,
                "shared: indices that both (all: at least two) have; by chance: of random sets of these sizes;",
                "conflicts: share of them with opposite signs; energy: their share of the sum's squares",
            ]
        )


def overlap(
    adapters: Sequence[Adapter], *, names: Sequence[str] | None = None, allow_other_names: bool = False
) -> OverlapReport:
    """What the adapters have in common, pair by pair and in all.

    Memory: one module of every adapter.

    Args:
        adapters: two or more, of one base.
        names: of the adapters, for the report. None: their folders.
        allow_other_names: the base may have another name in each of them.

    Raises:
        UserError: fewer than two adapters, or such of different bases.
    """
    if len(adapters) < 2:
        raise UserError(f"Got {len(adapters)} adapter(s) to compare; expected at least two.")
    check_same_base(adapters, allow_other_names=allow_other_names)
    report = OverlapReport(
        names=[str(adapter.folder) for adapter in adapters] if names is None else list(names),
        num_active=[0] * len(adapters),
        num_shared_by=[0] * len(adapters),
        in_all=SharedCounts(),
        pairs={pair: SharedCounts() for pair in combinations(range(len(adapters)), 2)},
    )
    shapes = {name: shape for adapter in adapters for name, shape in adapter.config.shapes.items()}
    for module_name, (num_rows, num_cols) in sorted(shapes.items()):
        _add_module(report, adapters, module_name, num_rows * num_cols)
    return report


def _add_module(report: OverlapReport, adapters: Sequence[Adapter], module_name: str, num_weights: int) -> None:
    numbers = [number for number, adapter in enumerate(adapters) if module_name in adapter.config.shapes]
    deltas = [adapters[number].read(module_name) for number in numbers]
    densities = {number: own.indices.numel() / num_weights for number, own in zip(numbers, deltas, strict=True)}
    for number, own in zip(numbers, deltas, strict=True):
        report.num_active[number] += own.indices.numel()
    report.in_all.num_shared_by_chance += num_weights * _chance_of_two(list(densities.values()))
    for (first, second), counts in report.pairs.items():
        counts.num_shared_by_chance += num_weights * densities.get(first, 0.0) * densities.get(second, 0.0)
    for chunk in aligned_chunks(deltas):
        num_present_U = report.in_all.add(chunk, range(len(numbers)))
        histogram = torch.bincount(num_present_U, minlength=len(adapters) + 1).tolist()
        report.num_shared_by = [old + new for old, new in zip(report.num_shared_by, histogram[1:], strict=True)]
        for (first, second), counts in report.pairs.items():
            rows = [row for row, number in enumerate(numbers) if number in (first, second)]
            if rows:
                counts.add(chunk, rows)


def _chance_of_two(densities: Sequence[float]) -> float:
    """The probability that at least two of independent events of these probabilities happen."""
    none, one = 1.0, 0.0
    for density in densities:
        none, one = none * (1 - density), one * (1 - density) + none * density
    return max(0.0, 1 - none - one)


def _row(label: str, counts: SharedCounts, of_first: str, of_second: str) -> tuple[str, ...]:
    return (
        label,
        f"{counts.num_shared:,}",
        f"{counts.num_shared_by_chance:,.0f}",
        of_first,
        of_second,
        _percent(counts.jaccard),
        _percent(counts.conflict_fraction),
        _percent(counts.energy_fraction),
    )


def _percent(fraction: float) -> str:
    return f"{fraction:.2%}"


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
