r"""Sparse fine-tuning on full matrices: what a run must do, written down a second time, slowly and in the plainest way.

One process, plain torch, a dense matrix and a boolean mask for every target, the dense gradient of every matrix.
Forward and backward are transformers' own; what is trained (deltas, optimizer state) is fp64, so that an oracle has no
rounding to speak of and ties are ties. Here is what every method shares (`DenseTraining`), and SFT-MA (`DenseOracle`):
the outer product of its accumulators is formed and sorted as a whole. `gradient_oracle` has the other methods.

    order of the samples   epoch e: torch.randperm(n) from a generator seeded with seed * 1000003 + e, cut to a whole
                           number of global batches; a step takes the next G samples
    loss                   sum of the negative log-likelihoods of the learned tokens of the G samples / their number
    learning rate          step t = 1 .. T, s = t - 1, w = ceil(T * warm-up fraction):
                           peak * s / w while s < w, then peak * (T - s) / (T - w)
    clipping               all active gradients / max(1, (their common 2-norm + 1e-6) / max_grad_norm)
    events                 after steps gamma, gamma + S, ...

    SFT-MA
    SM3                    nu = min(R_r, C_c) + g^2;  u = g / sqrt(nu + eps);  m = beta m + (1 - beta) u
                           w <- w - lr m - lr decay w;  R_r = max(R_r, nu in its row);  C_c = max(C_c, nu in its column)
    replaced weights       k = K at the first event, then floor(alpha (1 - t / T) K)
    drop                   the k active weights of smallest (|delta|, index)
    grow                   the k weights inactive before, of largest R_r * C_c, ties by smallest index; delta 0, m 0
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from tiny_llama_runs import Sample
from torch import Tensor
from transformers import LlamaForCausalLM


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The numbers of a run that an oracle needs, whatever the method; names as in the run's configuration."""

    total_steps: int
    global_batch_size: int
    interval_steps: int
    estimation_steps: int
    initial_drop_fraction: float
    learning_rate: float
    weight_decay: float
    eps: float | None
    """None: 1e-8."""
    max_grad_norm: float
    warmup_fraction: float
    eval_interval_steps: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Settings(RunSettings):
    """The numbers of a run of SFT-MA."""

    momentum: float


@dataclass
class Trace:
    """What the oracle did."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    event_hashes: dict[int, str] = field(default_factory=dict)
    num_replaced: dict[int, int] = field(default_factory=dict)
    gaps: list[float] = field(default_factory=list)
    """Of every decision (drop and growth of every tensor at every event): the relative distance of the last one chosen
    from the nearest other number that is not exactly equal to it."""
    num_tied: int = 0
    """Decisions that exact ties at the threshold left to the order of the indices."""
    heldout_losses: list[float] = field(default_factory=list)
    """At the start, every `eval_interval_steps` (after the step's event, if it has one) and at the end."""


class Matrix:
    """One target matrix: `base` [O, I] fp32 frozen, `active` [O, I] bool, and `delta` [O, I] fp64, 0 where inactive."""

    def __init__(self, base: Tensor, initial_indices: Tensor) -> None:
        self.base = base
        self.active = torch.zeros(base.numel(), dtype=torch.bool)
        self.active[initial_indices] = True
        self.active = self.active.view(base.shape)
        self.num_active = int(self.active.sum())
        self.delta = self.zeros()

    def zeros(self) -> Tensor:
        return torch.zeros(self.base.shape, dtype=torch.float64)

    @property
    def indices(self) -> NDArray[np.int64]:
        return np.flatnonzero(self.active.numpy())

    @property
    def values(self) -> Tensor:
        """[K] fp32, in the order of `indices`."""
        return self.delta[self.active].float()

    @property
    def merged(self) -> Tensor:
        return (self.base.double() + self.delta).float()

    def rounding_gap(self) -> float:
        """Of the changed weights, the smallest distance to the middle of the two bf16 numbers around one."""
        changed = self.delta != 0
        exact, rounded = (self.base.double() + self.delta)[changed], self.merged[changed].bfloat16()
        middles = [
            (rounded.double() + torch.nextafter(rounded, torch.full_like(rounded, towards)).double()) / 2
            for towards in (-math.inf, math.inf)
        ]
        return min(float((exact - middle).abs().min()) for middle in middles)


class DenseTraining(ABC):
    """A run of any method; see the module docstring.

    Args:
        model: the base model; its target weights are overwritten.
        matrices: the target matrices by module name.
        train, heldout: the samples in the order of the files.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        matrices: Mapping[str, Matrix],
        train: Sequence[Sample],
        heldout: Sequence[Sample],
        settings: RunSettings,
    ) -> None:
        self.model, self.targets, self.train, self.heldout, self.settings = model, matrices, train, heldout, settings
        self.trace = Trace()
        self.rounding_gaps: list[float] = []
        """Of every merging into a bf16 model: how near a changed weight is to the middle of two bf16 numbers."""
        model.requires_grad_(False)
        for name in matrices:
            model.get_submodule(name).weight.requires_grad_(True)

    def run(self) -> Trace:
        settings, trace = self.settings, self.trace
        trace.heldout_losses.append(self._heldout_loss())
        order = self._order_of_samples()
        for step in range(1, settings.total_steps + 1):
            start = (step - 1) * settings.global_batch_size
            samples = [self.train[i] for i in order[start : start + settings.global_batch_size]]
            self._materialise()
            trace.losses.append(self._train_step(step, samples))
            trace.learning_rates.append(self._learning_rate(step))
            if self._is_event(step):
                trace.num_replaced[step] = self._drop_and_grow(step)
                trace.event_hashes[step] = self._index_hash()
            if step % settings.eval_interval_steps == 0 or step == settings.total_steps:
                trace.heldout_losses.append(self._heldout_loss())
        return trace

    @abstractmethod
    def _train_step(self, step: int, samples: Sequence[Sample]) -> float:
        """Update what is trained; the weights of the model are those of before. Returns the loss."""

    @abstractmethod
    def _drop_and_grow(self, step: int) -> int:
        """The event after a step. Returns how many weights were dropped."""

    def _is_event(self, step: int) -> bool:
        settings = self.settings
        return step >= settings.estimation_steps and (step - settings.estimation_steps) % settings.interval_steps == 0

    def _order_of_samples(self) -> list[int]:
        settings, order = self.settings, []
        for epoch in range(settings.total_steps):  # more than are needed: an epoch is at least one step
            generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
            permutation = torch.randperm(len(self.train), generator=generator).tolist()
            order += permutation[: len(self.train) // settings.global_batch_size * settings.global_batch_size]
        return order

    def _gradients(self, samples: Sequence[Sample], num_tokens: int) -> tuple[float, dict[str, Tensor]]:
        """What some samples of a step add to its loss, a mean over `num_tokens`, and to its dense gradients."""
        loss, grads = 0.0, {name: matrix.zeros() for name, matrix in self.targets.items()}
        for sample in samples:
            self.model.zero_grad()
            part = self._negative_log_likelihood(sample) / num_tokens
            part.backward()
            loss += part.item()
            for name, grad in grads.items():
                grad += self.model.get_submodule(name).weight.grad
        return loss, grads

    def _clip(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """The gradients as the optimizer gets them; their norm, over active weights, goes to the trace."""
        square_sum = sum(float(grads[name][matrix.active].square().sum()) for name, matrix in self.targets.items())
        norm = math.sqrt(square_sum)
        self.trace.grad_norms.append(norm)
        divisor = max(1.0, (norm + 1e-6) / self.settings.max_grad_norm)
        return {name: grad / divisor for name, grad in grads.items()}

    def _learning_rate(self, step: int) -> float:
        settings, done = self.settings, step - 1
        warmup = math.ceil(settings.total_steps * settings.warmup_fraction)
        if done < warmup:
            return settings.learning_rate * done / warmup
        return settings.learning_rate * (settings.total_steps - done) / (settings.total_steps - warmup)

    def _materialise(self) -> None:
        with torch.no_grad():
            for name, matrix in self.targets.items():
                self.model.get_submodule(name).weight.copy_(matrix.merged)
        if self.model.dtype == torch.bfloat16:
            self.rounding_gaps += [matrix.rounding_gap() for matrix in self.targets.values() if matrix.delta.any()]

    def _negative_log_likelihood(self, sample: Sample) -> Tensor:
        """Sum over the learned tokens, in fp32; no padding, no attention mask, no loss of transformers."""
        ids = torch.tensor(sample.ids)
        log_probabilities = torch.log_softmax(self.model(input_ids=ids[None]).logits[0].float(), dim=-1)
        learned = torch.arange(sample.num_context, len(ids))
        return -log_probabilities[learned - 1, ids[learned]].sum()

    @torch.no_grad()
    def _heldout_loss(self) -> float:
        self._materialise()
        total = sum(float(self._negative_log_likelihood(sample)) for sample in self.heldout)
        return total / num_learned(self.heldout)

    def _index_hash(self) -> str:
        """sha256 over the digests of the tensors in the order of their names; a digest is the sha256 of name, NUL, K in
        decimal, NUL and the ascending indices as little-endian int64."""
        combined = hashlib.sha256()
        for name in sorted(self.targets):
            indices = self.targets[name].indices
            head = name.encode() + b"\0" + str(len(indices)).encode() + b"\0"
            combined.update(hashlib.sha256(head + indices.astype("<i8").tobytes()).digest())
        return combined.hexdigest()


class Target(Matrix):
    """One target matrix of SFT-MA, with the state of SM3 in fp64."""

    def __init__(self, base: Tensor, initial_indices: Tensor) -> None:
        super().__init__(base, initial_indices)
        self.exp_avg = self.zeros()
        self.row_max = torch.zeros(base.shape[0], dtype=torch.float64)
        self.col_max = torch.zeros(base.shape[1], dtype=torch.float64)

    def sm3_step(self, grad: Tensor, lr: float, settings: Settings) -> None:
        nu = torch.minimum(self.row_max[:, None], self.col_max[None, :]) + grad.square()
        update = grad / torch.sqrt(nu + (1e-8 if settings.eps is None else settings.eps))
        self.exp_avg = settings.momentum * self.exp_avg + (1 - settings.momentum) * update
        stepped = self.delta - lr * self.exp_avg - lr * settings.weight_decay * self.delta
        self.delta = torch.where(self.active, stepped, 0.0)
        self.exp_avg = torch.where(self.active, self.exp_avg, 0.0)
        nu = torch.where(self.active, nu, 0.0)
        self.row_max = torch.maximum(self.row_max, nu.amax(dim=1))
        self.col_max = torch.maximum(self.col_max, nu.amax(dim=0))

    def drop_and_grow(self, k: int, trace: Trace) -> int:
        active, inactive = self.indices, np.flatnonzero(~self.active.numpy())
        k = min(k, len(inactive))
        if k == 0:
            return 0
        dropped = smallest(self.delta.abs().numpy().reshape(-1), active, k, trace)
        grown = largest(torch.outer(self.row_max, self.col_max).numpy().reshape(-1), inactive, k, trace)
        flat_active = self.active.view(-1)
        flat_active[torch.from_numpy(dropped)] = False
        flat_active[torch.from_numpy(grown)] = True
        for state in (self.delta, self.exp_avg):
            state.view(-1)[torch.from_numpy(dropped)] = 0.0
        return k


class DenseOracle(DenseTraining):
    """SFT-MA; see the module docstring.

    Args:
        model: the base model in fp32; its target weights are overwritten.
        bases: fp32 base of every target matrix by module name (dequantized if the run's base is quantized).
        initial_indices: flat positions by module name.
        train, heldout: the samples in the order of the files.
    """

    targets: dict[str, Target]
    settings: Settings

    def __init__(
        self,
        model: LlamaForCausalLM,
        bases: dict[str, Tensor],
        initial_indices: dict[str, Tensor],
        train: Sequence[Sample],
        heldout: Sequence[Sample],
        settings: Settings,
    ) -> None:
        matrices = {name: Target(base, initial_indices[name]) for name, base in bases.items()}
        super().__init__(model, matrices, train, heldout, settings)

    def _train_step(self, step: int, samples: Sequence[Sample]) -> float:
        loss, grads = self._gradients(samples, num_learned(samples))
        clipped = self._clip(grads)
        for name, target in self.targets.items():
            target.sm3_step(clipped[name], self._learning_rate(step), self.settings)
        return loss

    def _drop_and_grow(self, step: int) -> int:
        return sum(t.drop_and_grow(self._num_to_replace(step, t), self.trace) for t in self.targets.values())

    def _num_to_replace(self, step: int, target: Target) -> int:
        if step == self.settings.estimation_steps:
            return target.num_active
        total = self.settings.total_steps
        exact = Fraction(str(self.settings.initial_drop_fraction)) * Fraction(total - step, total) * target.num_active
        return math.floor(exact)


def num_learned(samples: Sequence[Sample]) -> int:
    """Tokens that count in a loss."""
    return sum(len(sample.ids) - sample.num_context for sample in samples)


def smallest(scores: NDArray[np.float64], positions: NDArray[np.int64], k: int, trace: Trace) -> NDArray[np.int64]:
    """The k of the flat positions that have the smallest (score, position)."""
    order = np.lexsort((positions, scores[positions]))
    _note_gap(scores[positions[order]], k, trace)
    return positions[order[:k]]


def largest(scores: NDArray[np.float64], positions: NDArray[np.int64], k: int, trace: Trace) -> NDArray[np.int64]:
    """The k of the flat positions that have the largest score, of equal ones the smaller position."""
    order = np.lexsort((positions, -scores[positions]))
    _note_gap(scores[positions[order]], k, trace)
    return positions[order[:k]]


def _note_gap(in_order: NDArray[np.float64], k: int, trace: Trace) -> None:
    """`in_order[:k]` is chosen, the rest is not."""
    if k in (0, len(in_order)):
        return
    last, first_out = in_order[k - 1], in_order[k]
    if last == first_out:
        trace.num_tied += 1
        others = in_order[in_order != last]
    else:
        others = in_order[k : k + 1]
    if others.size:
        trace.gaps.append(float((np.abs(others - last) / np.maximum(others, last)).min()))
