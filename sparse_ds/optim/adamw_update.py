"""The arithmetic of one AdamW step, in plain torch and compiled into one kernel.

Both do the same elementary operations in the same order, those of `torch.optim.AdamW` without foreach. On CPU they
differ in one of them: torch's square root is off by one unit in the last place for about 20 % of all numbers (it comes
from a library of vectorized functions), the compiled one is rounded correctly. So both moments are bit for bit the same
and the values almost everywhere. Which one runs depends on the size alone, so a resumed run repeats an unbroken one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sparse_ds.kernels.compilation import CompiledUpdate

LARGEST_BETA = 0.99999
"""The table of bias corrections has 17.3 / (1 - beta) entries of 12 bytes: 0.2 MB for 0.999, 21 MB for this."""


@dataclass(frozen=True, eq=False)
class AgeCorrections:
    """Bias corrections by age, computed in fp64: in fp32, 1 - 0.999 is wrong by 6e-5.

    Entry a belongs to age a. The last one stands for all older ages: there both corrections are 1 in fp32. Entry 0
    is never used.

    Attributes:
        bias1: [cap + 1] fp64, 1 - beta1^age, divided by min(1, age / age_warmup_steps).
        root_bias2: [cap + 1] fp32, sqrt(1 - beta2^age).
    """

    bias1: Tensor
    root_bias2: Tensor


@lru_cache(maxsize=8)
def age_bias_corrections(betas: tuple[float, float], age_warmup_steps: int = 0) -> AgeCorrections:
    """The table for these betas, on the CPU. Memory: 12 bytes x 17.3 / (1 - the larger beta), or x the warm-up."""
    largest = max(betas)
    # fp32(1 - x) is 1 from x = 2^-25 on.
    cap = math.ceil(25 * math.log(2) / -math.log(largest)) if largest > 0 else 1
    ages = torch.arange(max(cap, age_warmup_steps) + 1, dtype=torch.float64)
    bias1, bias2 = (1 - beta**ages for beta in betas)
    if age_warmup_steps:
        bias1 = bias1 / (ages / age_warmup_steps).clamp_(max=1)
    return AgeCorrections(bias1, bias2.sqrt().float())


def correction_table(
    ages: Sequence[int], lr: float, betas: tuple[float, float], age_warmup_steps: int, device: torch.device
) -> Tensor:
    """What differs between weights of different ages.

    Args:
        ages: of each cohort, this step included.
        lr, betas, age_warmup_steps: as in the equations of `sparse_adamw`.
        device: of the weights.

    Returns:
        [2, C] fp32: -lr / (1 - beta1^age), rounded once as in torch's AdamW, and sqrt(1 - beta2^age). C is the number
        of cohorts, or 256 if that is more and there are several: one compiled kernel serves them all.
    """
    corrections = age_bias_corrections(betas, age_warmup_steps)
    index = torch.tensor(ages).clamp_(1, corrections.bias1.numel() - 1)
    table = torch.zeros(2, 1 if len(ages) == 1 else max(256, len(ages)))
    table[0, : len(ages)] = (-lr / corrections.bias1[index]).float()
    table[1, : len(ages)] = corrections.root_bias2[index]
    return table.to(device)


def adamw_update_(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    cohorts: Tensor | None,
    table: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step of some weights, each with the age of its cohort; equations at the top of `sparse_adamw`.

    Args:
        values: [n] fp32, updated in place.
        grad: [n] fp32, left as it is.
        exp_avg, exp_avg_sq: [n] fp32 moments, updated in place.
        cohorts: [n] uint8 or int32, columns of `table`; None: all weights have its only column.
        table: of `correction_table`.
        lr, betas, eps, weight_decay: as in the equations.
    """
    beta1, beta2 = betas
    if weight_decay:
        values.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    scale, root_bias2 = table
    if cohorts is not None:
        index = cohorts.int()
        scale, root_bias2 = scale.index_select(0, index), root_bias2.index_select(0, index)
    denominator = exp_avg_sq.sqrt().div_(root_bias2).add_(eps)
    values.add_((scale * exp_avg).div_(denominator))


def compiled_adamw_update_(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    cohorts: Tensor | None,
    table: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> bool:
    """`adamw_update_` in one pass over the weights, without temporary tensors.

    Returns:
        Whether it was done; without a working compiler nothing is changed.
    """
    beta1, beta2 = betas
    # In a tensor, so that another learning rate compiles nothing anew.
    numbers = torch.tensor([1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, eps]).to(values.device)
    return _compiled.run(values, grad, exp_avg, exp_avg_sq, cohorts, table, numbers)


def _fused_update() -> Callable[..., None]:
    from torch._inductor.inductor_prims import fma  # takes a second to import

    def update_(
        values: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        cohorts: Tensor | None,
        table: Tensor,
        numbers: Tensor,
    ) -> None:
        decay, weight1, beta2, weight2, eps = numbers.unbind()
        # As `lerp_` and `addcmul_` do on the CPU: the product is not rounded before the sum.
        average = fma(grad - exp_avg, weight1, exp_avg)
        average_sq = fma(weight2 * grad, grad, exp_avg_sq * beta2)
        if cohorts is None:
            scale, root_bias2 = table[0, 0], table[1, 0]
        else:
            index = cohorts.int()
            scale, root_bias2 = table[0][index], table[1][index]
        update = scale * average / (average_sq.sqrt() / root_bias2 + eps)
        values.copy_(values * decay + update)
        exp_avg.copy_(average)
        exp_avg_sq.copy_(average_sq)

    return update_


_compiled = CompiledUpdate(_fused_update, "the AdamW step")
