r"""SFT-AG, SpaRTA, Fisher and accumulated gradients on full matrices: see `dense_oracle` for what all methods share.

g                      dense gradient of the step's loss; g' = g / max(1, (norm + 1e-6) / max_grad_norm), norm over
                       the active weights
AdamW, every active    a <- a + 1;  w <- w (1 - lr decay);  m, v as in Adam, of g'
weight with its age a  w <- w - lr (m / (1 - b1^a)) / (sqrt(v / (1 - b2^a)) + eps)

SFT-AG
candidates             after the backward of step t - gamma + 1: the K positions of largest |g_1|, where g_1 is what
                       the first samples of the step add to g (`candidate_group_size`: micro batch x ranks, or all)
estimates              in steps t - gamma + 1 .. t: s <- s + g',  q <- q + g'^2
replaced weights       k = K at the first event, then floor(f K): linear f = alpha (1 - t / T),
                       cosine f = alpha (1 + cos(pi t / T)) / 2, constant f = alpha
drop                   the k active weights of smallest (score, index): score |w|, or |w - w after the last event|
grow                   the k candidates of largest |s| that are not staying active, ties by smallest index; fewer
                       are dropped if there are fewer
grown weights          w = 0, m = (1 - b1^gamma) s / gamma, v = (1 - b2^gamma) q / gamma, a = gamma; a weight that
                       is dropped and grown stays as it is

SpaRTA                 no events
Fisher                 no training before step gamma; then the active weights are the K positions of largest sum of
                       g_j^2, over what every micro batch of one rank (`micro_batch_size` samples) adds to g
accumulated gradient   the same with |sum of g|
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
from dense_oracle import DenseTraining, Matrix, RunSettings, Trace, largest, num_learned, smallest
from numpy.typing import NDArray
from tiny_llama_runs import Sample
from torch import Tensor
from transformers import LlamaForCausalLM


@dataclass(frozen=True, kw_only=True)
class GradientSettings(RunSettings):
    """The numbers of a run of one of these methods."""

    method: Literal["sft_ag", "sparta", "fisher", "accumulated_gradient"]
    betas: tuple[float, float] = (0.9, 0.999)
    group_size: int
    """Samples whose gradients are taken together. SFT-AG: `candidate_group_size` of the module's docstring. Fisher: the
    micro batch of one rank. Otherwise without effect."""
    drop_schedule: Literal["linear", "cosine", "constant"] = "linear"
    drop_criterion: Literal["magnitude", "change"] = "magnitude"

    @property
    def selects_once(self) -> bool:
        return self.method in ("fisher", "accumulated_gradient")


class AdamMatrix(Matrix):
    """One target matrix with all of AdamW's state and all statistics, dense: of those only some entries are used."""

    def __init__(self, base: Tensor, initial_indices: Tensor) -> None:
        super().__init__(base, initial_indices)
        self.exp_avg, self.exp_avg_sq, self.age = self.zeros(), self.zeros(), self.zeros()
        self.delta_at_event = self.zeros()
        self.candidates = np.empty(0, dtype=np.int64)
        self.sum_grad, self.sum_grad_sq = self.zeros(), self.zeros()

    def adamw_step(self, grad: Tensor, lr: float, settings: GradientSettings) -> None:
        beta1, beta2 = settings.betas
        age = self.age + 1
        delta = self.delta * (1 - lr * settings.weight_decay)
        exp_avg = beta1 * self.exp_avg + (1 - beta1) * grad
        exp_avg_sq = beta2 * self.exp_avg_sq + (1 - beta2) * grad.square()
        root = torch.sqrt(exp_avg_sq / (1 - beta2**age)) + (1e-8 if settings.eps is None else settings.eps)
        self._keep_active(delta - lr * (exp_avg / (1 - beta1**age)) / root, exp_avg, exp_avg_sq, age)

    def choose_candidates(self, grad: Tensor, trace: Trace) -> None:
        self.candidates = largest(grad.abs().numpy().reshape(-1), np.arange(grad.numel()), self.num_active, trace)
        self.sum_grad, self.sum_grad_sq = self.zeros(), self.zeros()

    def estimate(self, grad: Tensor) -> None:
        self.sum_grad += grad
        self.sum_grad_sq += grad.square()

    def drop_and_grow(self, k: int, settings: GradientSettings, trace: Trace) -> int:
        """Returns how many weights came in that were not active before."""
        reference = self.delta_at_event if settings.drop_criterion == "change" else 0.0
        scores = (self.delta - reference).abs().numpy().reshape(-1)
        for num_dropped in range(k, -1, -1):
            dropped = smallest(scores, self.indices, num_dropped, trace)
            staying = np.setdiff1d(self.indices, dropped)
            eligible = np.setdiff1d(self.candidates, staying)
            if len(eligible) >= num_dropped:
                break
        grown = largest(self.sum_grad.abs().numpy().reshape(-1), eligible, num_dropped, trace)
        new = np.setdiff1d(grown, dropped)
        self._activate(np.concatenate((staying, grown)))
        self._seed(new, settings)
        self._keep_active(self.delta, self.exp_avg, self.exp_avg_sq, self.age)
        self.delta_at_event = self.delta.clone()
        return len(new)

    def replace_all(self, trace: Trace) -> None:
        """The active weights become those of largest |sum_grad|, as new as at the start."""
        chosen = largest(self.sum_grad.abs().numpy().reshape(-1), np.arange(self.base.numel()), self.num_active, trace)
        self._activate(chosen)

    def _seed(self, positions: NDArray[np.int64], settings: GradientSettings) -> None:
        (beta1, beta2), n = settings.betas, settings.estimation_steps
        new = torch.zeros(self.base.numel(), dtype=torch.bool)
        new[torch.from_numpy(positions)] = True
        new = new.view(self.base.shape)
        self.exp_avg[new] = (1 - beta1**n) * self.sum_grad[new] / n
        self.exp_avg_sq[new] = (1 - beta2**n) * self.sum_grad_sq[new] / n
        self.age[new] = n

    def _activate(self, positions: NDArray[np.int64]) -> None:
        assert len(np.unique(positions)) == self.num_active
        self.active = torch.zeros_like(self.active)
        self.active.view(-1)[torch.from_numpy(positions)] = True

    def _keep_active(self, delta: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, age: Tensor) -> None:
        self.delta, self.exp_avg, self.exp_avg_sq, self.age = (
            torch.where(self.active, state, 0.0) for state in (delta, exp_avg, exp_avg_sq, age)
        )


class GradientOracle(DenseTraining):
    """See the module docstring.

    Args:
        model: the base model in fp32 or bf16; its target weights are overwritten.
        bases: fp32 base of every target matrix by module name (dequantized if the run's base is quantized; of a bf16
            model its weights).
        initial_indices: flat positions by module name.
        train, heldout: the samples in the order of the files.
    """

    targets: dict[str, AdamMatrix]
    settings: GradientSettings

    def __init__(
        self,
        model: LlamaForCausalLM,
        bases: dict[str, Tensor],
        initial_indices: dict[str, Tensor],
        train: Sequence[Sample],
        heldout: Sequence[Sample],
        settings: GradientSettings,
    ) -> None:
        matrices = {name: AdamMatrix(base, initial_indices[name]) for name, base in bases.items()}
        super().__init__(model, matrices, train, heldout, settings)
        self.num_new: dict[int, int] = {}
        """By event: weights that were not active before it."""

    def _train_step(self, step: int, samples: Sequence[Sample]) -> float:
        settings, num_tokens = self.settings, num_learned(samples)
        num_before = (step - 1) % settings.interval_steps
        begins, estimates = num_before == 0, num_before < settings.estimation_steps
        loss, grads = 0.0, {name: matrix.zeros() for name, matrix in self.targets.items()}
        for start in range(0, len(samples), settings.group_size):
            group_loss, group_grads = self._gradients(samples[start : start + settings.group_size], num_tokens)
            loss += group_loss
            for name, matrix in self.targets.items():
                grads[name] += group_grads[name]
                if settings.method == "sft_ag" and begins and start == 0:
                    matrix.choose_candidates(group_grads[name], self.trace)
                if settings.method == "fisher" and step <= settings.estimation_steps:
                    matrix.estimate(group_grads[name].square())
        clipped = self._clip(grads)
        for name, matrix in self.targets.items():
            if settings.selects_once and step <= settings.estimation_steps:
                if settings.method == "accumulated_gradient":
                    matrix.estimate(grads[name])
                continue
            if settings.method == "sft_ag" and estimates:
                matrix.estimate(clipped[name])
            matrix.adamw_step(clipped[name], self._learning_rate(step), settings)
        return loss

    def _is_event(self, step: int) -> bool:
        if self.settings.selects_once:
            return step == self.settings.estimation_steps
        return self.settings.method == "sft_ag" and super()._is_event(step)

    def _drop_and_grow(self, step: int) -> int:
        """Returns how many weights were asked to be dropped: without the kept ones that is `num_new`."""
        num_replaced, self.num_new[step] = 0, 0
        for matrix in self.targets.values():
            if self.settings.selects_once:
                matrix.replace_all(self.trace)
                continue
            k = self._num_to_replace(step, matrix)
            num_replaced += k
            self.num_new[step] += matrix.drop_and_grow(k, self.settings, self.trace)
        return num_replaced

    def _num_to_replace(self, step: int, matrix: AdamMatrix) -> int:
        settings, num_active = self.settings, matrix.num_active
        if step == settings.estimation_steps:
            return num_active
        alpha = Fraction(str(settings.initial_drop_fraction))
        if settings.drop_schedule == "linear":
            return math.floor(alpha * Fraction(settings.total_steps - step, settings.total_steps) * num_active)
        if settings.drop_schedule == "constant":
            return math.floor(alpha * num_active)
        exact = float(alpha) * (1 + math.cos(math.pi * step / settings.total_steps)) / 2 * num_active
        assert abs(exact - round(exact)) > 1e-9, "which side of a whole number this is must not hang on rounding"
        return math.floor(exact)
