"""When drop-and-grow events happen, and how many weights each of them replaces.

With S = `interval_steps`, gamma = `estimation_steps`, alpha = `initial_drop_fraction`, T = `total_steps`::

    events at steps       t = gamma, gamma + S, gamma + 2 S, ...      (after the optimizer step t, counted from 1)
    estimation steps      t - gamma + 1 .. t                          (exactly gamma before every event)
    weights replaced      K at the first event, then floor(f * K) with

    drop_schedule         linear    f = alpha * (1 - t / T)
                          cosine    f = alpha * (1 + cos(pi * t / T)) / 2
                          constant  f = alpha

Reference: Scaling Sparse Fine-Tuning to Large Language Models (Ansell et al. 2024, arXiv 2401.16405), section 3, which
is `linear`; the cosine is that of Rigging the Lottery: Making All Tickets Winners (Evci et al. 2020, arXiv 1911.11134),
section 3.
"""

from __future__ import annotations

import math
from fractions import Fraction


def is_event(step: int, *, interval_steps: int, estimation_steps: int) -> bool:
    """Whether an event follows optimizer step `step` (the first step is 1)."""
    _check(interval_steps, estimation_steps)
    return step >= estimation_steps and (step - estimation_steps) % interval_steps == 0


def num_to_replace(
    step: int,
    *,
    num_active: int,
    total_steps: int,
    interval_steps: int,
    estimation_steps: int,
    initial_drop_fraction: float,
    drop_schedule: str = "linear",
    first_drop_fraction: float = 1.0,
) -> int:
    """How many of a tensor's `num_active` weights the event after step `step` drops and grows; 0 if there is no event.

    For `linear` and `constant` the floor is taken in exact arithmetic of the decimal that was written in the config:
    0.2 is one fifth, so that a product that is an integer stays that integer. A cosine has no such decimal: `cosine` is
    computed in fp64, and the floor is that of the fp64 product.
    """
    assert 1 <= step <= total_steps, f"step {step} is outside of 1 .. {total_steps}"
    assert 0 <= initial_drop_fraction <= 1, f"initial_drop_fraction: {initial_drop_fraction} is outside of 0 .. 1"
    if not is_event(step, interval_steps=interval_steps, estimation_steps=estimation_steps):
        return 0
    if step == estimation_steps:
        return int(Fraction(str(first_drop_fraction)) * num_active)
    if drop_schedule == "linear":
        return int(Fraction(str(initial_drop_fraction)) * Fraction(total_steps - step, total_steps) * num_active)
    if drop_schedule == "constant":
        return int(Fraction(str(initial_drop_fraction)) * num_active)
    assert drop_schedule == "cosine", f"drop_schedule: {drop_schedule!r} is none of linear, cosine, constant"
    return int(initial_drop_fraction * (1 + math.cos(math.pi * step / total_steps)) / 2 * num_active)


def _check(interval_steps: int, estimation_steps: int) -> None:
    assert interval_steps > estimation_steps >= 1, (
        f"interval_steps {interval_steps} and estimation_steps {estimation_steps}: expected interval > estimation >= 1"
    )
