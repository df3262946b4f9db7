r"""SM3-II over the active entries of matrices: one accumulator per row and per column instead of one per weight.

For an active entry at (r, c) with gradient g, learning rate :math:`\eta` and decoupled weight decay :math:`\lambda`

.. math::
    \nu &= \min(R_r, C_c) + g^2 \\
    u &= g / \sqrt{\nu + \epsilon}, \quad 0 / 0 = 0 \\
    m &\leftarrow \beta m + (1 - \beta) u \quad (\text{only with momentum, else } m = u) \\
    w &\leftarrow w - \eta m - \eta \lambda w \\
    R'_r &= \max(R_r, \max_{c \text{ active in } r} \nu), \quad C'_c = \max(C_c, \max_{r \text{ active in } c} \nu)

`w` is a delta, so the decay pulls towards the pretrained weight. The accumulators are fp32 and replicated; without
momentum there is no state per weight at all. They never decrease. R_r * C_c is the score by which SFT-MA grows.

Differs from the paper: SM3-II restarts R' and C' from 0 and takes the maximum over the current entries; here the
old value takes part. On a fixed set of active entries both are the same number: the entry that attained R_r had
C_c >= R_r from then on, so its next nu is at least R_r (likewise for columns). With drop-and-grow it is an extension:
the accumulator of a row keeps what entries dropped since have contributed, and that of a row without active entries
stays. Restarting instead would give grown entries far too large first steps and would take their score from the very
rows and columns that were dropped. `eps` is added to nu inside the root.

References: Memory-Efficient Adaptive Optimization (Anil et al. 2019, arXiv 1901.11150), Algorithm SM3-II; the
accumulators as growth scores: Scaling Sparse Fine-Tuning to Large Language Models (Ansell et al. 2024, arXiv
2401.16405).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor

from sparse_ds.optim.accumulator_slots import AccumulatorSlots
from sparse_ds.optim.flat_segment import FlatSegment, padding_positions, padding_ranges
from sparse_ds.optim.row_col_accumulators import RowColAccumulators

# Elements updated at a time. It bounds the transient memory (about 45 bytes an element) at 47 MB.
_CHUNK_ELEMENTS = 1 << 20


def sm3_update_(
    values: Tensor,
    grad: Tensor,
    rows: Tensor,
    cols: Tensor,
    accumulators: Tensor,
    pending: Tensor,
    exp_avg: Tensor | None,
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    eps: float,
) -> None:
    """One SM3-II step of some active entries of any matrices; equations at the top of this file.

    Every elementary operation is rounded on its own (no fused multiply-add), so that the result is bit for bit the
    same however the entries are cut into calls.

    Args:
        values: [n] fp32, updated in place.
        grad: [n], left as it is.
        rows, cols: [n] int64, where each entry's row and column accumulators lie.
        accumulators: fp32, all of them, at the end of the previous step; only read.
        pending: the same shape; raised in place to the new nu.
        exp_avg: [n] fp32, updated in place; None without momentum.
        lr, weight_decay, momentum, eps: as in the equations.
    """
    grad = grad.float()
    nu = torch.minimum(accumulators.index_select(0, rows), accumulators.index_select(0, cols))
    nu.add_(grad.square())
    pending.scatter_reduce_(0, rows, nu, "amax")
    pending.scatter_reduce_(0, cols, nu, "amax")
    root = nu.add_(eps).sqrt_()
    update = torch.div(grad, root).masked_fill_(root == 0, 0.0)
    if exp_avg is not None:
        update = exp_avg.mul_(momentum).add_(update.mul_(1 - momentum))
    if weight_decay:
        values.mul_(1 - lr * weight_decay)
    values.sub_(update * lr)


class SparseSM3(torch.optim.Optimizer):
    """SM3-II for flat fp32 tensors that join pieces of sparse and dense tensors; it never communicates.

    Life of a step, on every rank::

        optimizer.step()                                     any number of times (ZeRO-3: once per sub-group)
        all_reduce(optimizer.pending_accumulators, MAX)      the caller's business, with several ranks
        optimizer.finish_step()                              once

    All `step` calls of one step read the accumulators of the end of the previous step, so sub-groups, ranks and
    slices do not change the result. `params` at construction are those of the param groups; what is trained is what
    `register_flat` was told (DeepSpeed replaces the params of a group by one registered flat tensor before each
    `step`).

    Memory: 2 x 4 bytes per row and column; with momentum 4 bytes per element in `state[flat]["exp_avg"]`; transient
    at most 47 MB.

    Args:
        params: as for every torch optimizer.
        lr: learning rate; read at each step from the param group, so schedulers work.
        weight_decay: decoupled, times lr, acts on the values (the deltas).
        momentum: decay of the running mean of the updates; 0 keeps no such mean.
        eps: added to nu inside the root.

    Example:
        >>> values = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = SparseSM3([values], lr=0.1)
        >>> optimizer.register_flat(values, [FlatSegment("w", 0, 2, 3, 3, indices=torch.tensor([1, 5]))])
        >>> values.grad = torch.tensor([1.0, -2.0])
        >>> optimizer.step()
        >>> optimizer.finish_step()
        >>> optimizer.row_accumulator("w")
        tensor([1., 4., 0.])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        eps: float = 1e-8,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: got {momentum}, expected 0 <= momentum < 1")
        for key, value in (("lr", lr), ("weight_decay", weight_decay), ("eps", eps)):
            if not value >= 0:
                raise ValueError(f"{key}: got {value}, expected a number >= 0")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eps": eps})
        self._accumulators = RowColAccumulators()
        self._segments: dict[Tensor, list[FlatSegment]] = {}
        self._padding: dict[Tensor, Tensor | None] = {}
        self._slots: dict[Tensor, AccumulatorSlots] = {}
        self._stepped: set[Tensor] = set()

    def register_flat(self, flat: Tensor, segments: list[FlatSegment]) -> None:
        """Say what lies where in `flat`; once per flat tensor, before its first step.

        All ranks register the same tensors in the same order (with `length=0` where a rank owns nothing), so that
        the coalesced accumulators have one layout. Accumulator views taken before become stale.

        Args:
            flat: contiguous fp32 tensor of any shape, the very object that `step` will find in a param group.
            segments: its real elements, non-overlapping, ascending by offset; anything else is padding: its values
                are never changed, its gradients never used (`step` sets them to 0).
        """
        assert flat.dtype == torch.float32 and flat.is_contiguous(), (
            f"flat tensor: {flat.dtype}, expected contiguous fp32"
        )
        assert flat not in self._segments, "this flat tensor is registered already"
        end = 0
        shapes: dict[str, tuple[int, int]] = {}
        for segment in segments:
            segment.check(flat.numel())
            assert segment.offset >= end, f"segment {segment.name!r} overlaps the one before it, or is out of order"
            end = segment.offset + segment.length
            shape = segment.num_rows, segment.num_cols
            assert shapes.setdefault(segment.name, shape) == shape, f"{segment.name!r}: segments of different shapes"
        self._accumulators.add(shapes, flat.device)
        self._segments[flat] = list(segments)
        self._padding[flat] = padding_positions(padding_ranges(segments, flat.numel()), flat.device)
        if any(group["momentum"] for group in self.param_groups):
            self.state[flat]["exp_avg"] = torch.zeros_like(flat, requires_grad=False)

    @property
    def accumulators(self) -> Tensor:
        """All accumulators as of the last finished step: 1-D fp32, `| rows | cols |` of each tensor in turn."""
        return self._accumulators.committed

    @property
    def pending_accumulators(self) -> Tensor:
        """What `finish_step` will make current; the buffer to reduce with MAX across ranks, in place."""
        return self._accumulators.pending

    @property
    def accumulator_names(self) -> list[str]:
        """All registered tensors, in the order of the buffer."""
        return list(self._accumulators.shapes)

    def row_accumulator(self, name: str) -> Tensor:
        """[num_rows] fp32 view of `accumulators`."""
        return self._accumulators.split(name, self._accumulators.committed)[0]

    def col_accumulator(self, name: str) -> Tensor:
        """[num_cols] fp32 view of `accumulators`."""
        return self._accumulators.split(name, self._accumulators.committed)[1]

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the flat tensors that are in the param groups now and have a gradient.

        Raises:
            RuntimeError: a flat tensor is not registered, or `finish_step` was not called since its last update.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    self._step_flat(flat, group)
        return loss

    def _step_flat(self, flat: Tensor, group: dict[str, Any]) -> None:
        if flat not in self._segments:
            raise RuntimeError(
                f"SM3 got an unregistered tensor of {flat.numel()} elements: call register_flat before training"
            )
        if flat in self._stepped:
            raise RuntimeError("SM3 updated a tensor twice in one step: call finish_step() once after every step")
        self._stepped.add(flat)
        exp_avg = self.state[flat]["exp_avg"].view(-1) if group["momentum"] else None
        assert flat.grad is not None
        if not any(segment.length for segment in self._segments[flat]):
            return
        values, grad, padding = flat.detach().view(-1), flat.grad.view(-1), self._padding[flat]
        untouched = None
        if padding is not None:
            grad.index_fill_(0, padding, 0.0)
            untouched = values.index_select(0, padding)
        for chunk, rows, cols in self._slots_of(flat):
            sm3_update_(
                values[chunk],
                grad[chunk],
                rows,
                cols,
                self._accumulators.committed,
                self._accumulators.pending,
                None if exp_avg is None else exp_avg[chunk],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                eps=group["eps"],
            )
        if padding is not None and untouched is not None:
            values.index_copy_(0, padding, untouched)

    def _slots_of(self, flat: Tensor) -> AccumulatorSlots:
        if flat not in self._slots:
            self._slots[flat] = AccumulatorSlots(
                self._segments[flat],
                flat.numel(),
                self._accumulators.offset,
                chunk_elements=_CHUNK_ELEMENTS,
                device=flat.device,
            )
        return self._slots[flat]

    def finish_step(self) -> None:
        """Make the pending accumulators current; once a step, after its `step` calls and the reduction."""
        self._accumulators.commit()
        self._stepped.clear()

    def read_weight_states(self) -> dict[str, list[Tensor]]:
        """State per weight: `exp_avg` with momentum, else nothing; one tensor per flat, the state itself."""
        if not any(group["momentum"] for group in self.param_groups):
            return {}
        return {"exp_avg": [self.state[flat]["exp_avg"] for flat in self._segments]}

    def write_weight_states(self, states: Mapping[str, list[Tensor]]) -> None:
        """Nothing is left to do: what `read_weight_states` returns is the state itself."""

    def state_dict(self) -> dict[str, Any]:
        """As of every torch optimizer, plus `accumulators`: `(row, col)` by tensor name. Call it between steps."""
        if self._stepped:
            raise RuntimeError("SM3 state asked for in the middle of a step: call finish_step() first")
        return {**super().state_dict(), "accumulators": self._accumulators.state_dict()}

    def load_accumulators(self, accumulators: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Take over `(row, col)` by tensor name; the flat tensors must be registered.

        Raises:
            RuntimeError: they belong to other tensors.
        """
        self._accumulators.load_state_dict(accumulators)
        self._stepped.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; the flat tensors must be registered.

        Raises:
            RuntimeError: the saved accumulators are missing or belong to other tensors.
        """
        if "accumulators" not in state_dict:
            raise RuntimeError("this optimizer state has no `accumulators`: it was not saved by SM3")
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "accumulators"})
        self.load_accumulators(state_dict["accumulators"])
