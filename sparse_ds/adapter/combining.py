"""Several adapters of one base as a single adapter, computed module by module when it is read.

With delta_t(i) the value of adapter t at index i (0 where it has none) and w_t its weight:

    sum          sum_t delta_t
    linear       sum_t w_t delta_t                           task arithmetic, Ilharco et al. 2023, arXiv 2212.04089
    ties         1. trim: of each matrix of each adapter only the `density` share of largest |value| stays
                 2. elect: sign(i) = sign of sum_t delta_t(i), + for 0
                 3. merge: mean of w_t delta_t(i) over the adapters whose delta_t(i) has that sign
                                                             TIES, Yadav et al. 2023, arXiv 2306.01708, section 4
    dare_linear  every delta is dropped with probability p = `drop_rate`, the others are divided by 1 - p; then linear
    dare_ties    the same, then steps 2 and 3 of ties        DARE, Yu et al. 2023, arXiv 2311.03099, section 3

Sums are taken in fp64 and rounded to fp32 once. An index is in the result if at least one adapter has it after trimming
or dropping; what no adapter has is 0 and stays 0, so the whole result is known from the adapters alone. Memory is that
of one module's deltas of all adapters, and their union.

Differs from the papers: TIES trims the task vectors of dense models, where `density` is a share of all weights, of the
whole model at once; a sparse adapter is trimmed already, so here it is a share of the trained deltas, of each matrix by
itself, so that no more than one module is in memory. An exact tie in the election goes to +, as in peft (the authors'
code gives it the majority sign of the model). Signs are elected before the weights, as in peft.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, task_arithmetic
from torch import Tensor

from sparse_ds.adapter.adapter import Adapter, AdapterConfig, Deltas
from sparse_ds.adapter.aligned import AlignedChunk, aligned_chunks, union_of
from sparse_ds.adapter.same_base import check_same_base
from sparse_ds.config.errors import UserError
from sparse_ds.selection.bernoulli_subset import bernoulli_subset
from sparse_ds.sparse.layout import num_active_weights

CombiningMethod = Literal["sum", "linear", "ties", "dare_linear", "dare_ties"]


@dataclass(frozen=True)
class Combination:
    """How adapters are put together.

    Raises:
        UserError: an unknown method, a number out of its range, one that the method needs and that is missing, or one
            that it has no use for.
    """

    method: CombiningMethod = "sum"
    weights: tuple[float, ...] | None = None
    """One number for each adapter. `linear` needs them; the others but `sum` take 1 each by default. Not 0; above 0 for
    `ties` and `dare_ties`, where signs are elected."""
    density: float | None = None
    """Of `ties`: the share of each adapter's deltas that stays, above 0, at most 1."""
    drop_rate: float | None = None
    """Of `dare_linear` and `dare_ties`: the probability with which a delta is dropped, 0 or more, below 1."""
    seed: int | None = None
    """Of the same two: which deltas are dropped depends on it, the number of the adapter and the module's name only.
    None: 0."""

    def __post_init__(self) -> None:
        if problem := self._problem():
            raise UserError(f"Merging by '{self.method}': {problem}.")

    @property
    def elects_signs(self) -> bool:
        return self.method in ("ties", "dare_ties")

    @property
    def drops(self) -> bool:
        return self.method in ("dare_linear", "dare_ties")

    def weights_of(self, num_adapters: int) -> tuple[float, ...]:
        """One number for each adapter.

        Raises:
            UserError: there are not as many weights as adapters.
        """
        if self.weights is None:
            return (1.0,) * num_adapters
        if len(self.weights) != num_adapters:
            raise UserError(
                f"Merging by '{self.method}': got {len(self.weights)} weights for {num_adapters} adapters; expected "
                "one for each."
            )
        return self.weights

    def _problem(self) -> str | None:
        if self.method not in get_args(CombiningMethod):
            return f"there is no such method; expected one of {', '.join(get_args(CombiningMethod))}"
        for name, needed in (("density", self.method == "ties"), ("drop_rate", self.drops)):
            if (getattr(self, name) is not None) != needed:
                return f"it needs a {name}" if needed else f"it takes no {name}; leave it out"
        if self.seed is not None and not self.drops:
            return "it takes no seed, since nothing is random; leave it out"
        if self.weights is None and self.method == "linear":
            return "it needs weights, one for each adapter"
        if self.weights is not None and self.method == "sum":
            return "it takes no weights; leave them out, or merge by 'linear'"
        if self.density is not None and not 0 < self.density <= 1:
            return f"density is {self.density}, expected a number above 0 and at most 1"
        if self.drop_rate is not None and not 0 <= self.drop_rate < 1:
            return f"drop_rate is {self.drop_rate}, expected 0 or more and less than 1"
        for weight in self.weights or ():
            if not math.isfinite(weight) or weight == 0:
                return f"a weight is {weight}, expected a number other than 0; leave an adapter without weight out"
            if weight < 0 and self.elects_signs:
                return f"a weight is {weight}, expected numbers above 0, since signs are elected before the weights"
        return None


class CombinedAdapter(Adapter):
    """Several adapters as one. They are read once when it is made, to count the union, and again with every `read`.

    Modules that only some of the adapters have are kept: for the others their deltas are 0.

    Args:
        adapters: of one base, in the order of `combination.weights`.
        combination: how.
        allow_other_names: the base may have another name in each of them.

    Raises:
        UserError: adapters of different bases, forms or tasks; one with tensors that trained as a whole (a head); not
            as many weights as adapters; nothing left after trimming or dropping; a number beyond fp32.

    Attributes:
        folder: of the first adapter.
        adapters: all of them.
        combination: how.
        num_active: module name -> K of the result.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        combination: Combination | None = None,
        *,
        allow_other_names: bool = False,
    ) -> None:
        for adapter in adapters:
            if adapter.config.dense_shapes:
                raise UserError(
                    f"Adapter '{adapter.folder}' holds tensors that trained as a whole "
                    f"({', '.join(sorted(adapter.config.dense_shapes))}), which cannot be added up. Make a multi-head "
                    "model of such adapters: one merged body, and the head of each."
                )
        check_same_base(adapters, allow_other_names=allow_other_names)
        self.adapters = tuple(adapters)
        self.combination = combination or Combination()
        self._weights = self.combination.weights_of(len(adapters))
        self.folder = adapters[0].folder
        shapes = {name: shape for adapter in adapters for name, shape in sorted(adapter.config.shapes.items())}
        self.num_active = {name: self._count(name) for name in shapes}
        num_active = sum(self.num_active.values())
        if num_active == 0:
            raise UserError(
                f"Merging by '{self.combination.method}' leaves no delta of {len(adapters)} adapters. Keep more of "
                "them (a higher density, a lower drop_rate)."
            )
        self.config = self._make_config(shapes, num_active / sum(rows * cols for rows, cols in shapes.values()))

    def read(self, module_name: str) -> Deltas:
        contributions = self._contributions(module_name)
        weights_A = torch.tensor([self._weights[number] for number, _ in contributions], dtype=torch.float64)
        indices, values = [], []
        for chunk in aligned_chunks([deltas for _, deltas in contributions]):
            indices.append(chunk.indices)
            values.append(self._merge(chunk, weights_A).float())
        if not indices:
            return Deltas(contributions[0][1].indices, torch.zeros(0))
        values_K = torch.cat(values)
        if not bool(values_K.isfinite().all()):
            raise UserError(
                f"Merging by '{self.combination.method}' gives values of '{module_name}' that fp32 cannot hold. "
                "Choose smaller weights or a lower drop_rate."
            )
        return Deltas(torch.cat(indices), values_K)

    def read_dense(self, name: str) -> Tensor:
        raise KeyError(name)

    @property
    def sources(self) -> tuple[Path, ...]:
        return tuple(source for adapter in self.adapters for source in adapter.sources)

    def _merge(self, chunk: AlignedChunk, weights_A: Tensor) -> Tensor:
        """[U] fp64."""
        if self.combination.elects_signs:
            signs_AU = calculate_majority_sign_mask(chunk.values)
            elected_U: Tensor = disjoint_merge(chunk.values * weights_A[:, None], signs_AU)
            return elected_U
        sum_U: Tensor = task_arithmetic(list(chunk.values), weights_A)
        return sum_U

    def _contributions(self, module_name: str) -> list[tuple[int, Deltas]]:
        """(number of the adapter, what is left of its deltas) for each that has the module."""
        found = []
        for number, adapter in enumerate(self.adapters):
            if module_name not in adapter.config.shapes:
                continue
            deltas = adapter.read(module_name)
            if self.combination.density is not None:
                deltas = _trim(deltas, self.combination.density)
            if self.combination.drop_rate is not None:
                name = f"merging, adapter {number}: {module_name}"
                deltas = _drop(deltas, self.combination.drop_rate, seed=self.combination.seed or 0, name=name)
            found.append((number, deltas))
        return found

    def _count(self, module_name: str) -> int:
        return union_of([deltas.indices for _, deltas in self._contributions(module_name)]).numel()

    def _make_config(self, shapes: dict[str, tuple[int, int]], density: float) -> AdapterConfig:
        first = self.adapters[0].config
        # The hash is of all target matrices together: that of an adapter which has fewer is not that of the result.
        complete = [adapter.config.base for adapter in self.adapters if adapter.config.shapes.keys() == shapes.keys()]
        hashes = [base.weights_hash for base in complete if base.weights_hash is not None]
        return AdapterConfig(
            method=f"merge_{self.combination.method}",
            density=density,
            base=first.base.model_copy(update={"weights_hash": hashes[0] if hashes else None}),
            shapes=shapes,
            task=first.task,
            labels=first.labels,
            pad_token_id=first.pad_token_id,
        )


def _trim(deltas: Deltas, density: float) -> Deltas:
    """The floor(density * K) deltas of largest |value|; of equal ones those of smaller index."""
    num_kept = num_active_weights(density, deltas.values.numel())
    # peft's `magnitude_based_pruning` leaves ties to topk, and its floor makes 28 of 0.29 * 100.
    order = deltas.values.abs().sort(descending=True, stable=True).indices
    kept = order[:num_kept].sort().values
    return Deltas(deltas.indices[kept], deltas.values[kept])


def _drop(deltas: Deltas, drop_rate: float, *, seed: int, name: str) -> Deltas:
    """Each delta is dropped with probability `drop_rate`, the others are divided by what is left of 1 (fp64)."""
    num_deltas = deltas.values.numel()
    is_kept = torch.ones(num_deltas, dtype=torch.bool)
    if num_deltas > 0:
        is_kept[bernoulli_subset(num_deltas, drop_rate, seed=seed, name=name)] = False
    return Deltas(deltas.indices[is_kept], deltas.values[is_kept].double() / (1 - drop_rate))
