"""How likely a model finds given texts, on any number of ranks in step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_ds.distributed.process_group import rank, world_size
from sparse_ds.distributed.zero3_partitions import all_reduce_sum
from sparse_ds.evaluation.prompts import ScoredText

PAD_TO_MULTIPLE_OF = 8
"""Keeps matrix units busy, as in training."""


class Likelihood(NamedTuple):
    """Of one text: the sum of the log-probabilities of its scored tokens (nats), and whether each of them is the
    token that the model finds likeliest."""

    log_probability: float
    is_greedy: bool


@torch.no_grad()
def score_texts(
    model: torch.nn.Module, texts: Sequence[ScoredText], batch_size: int, pad_token_id: int, device: torch.device
) -> list[Likelihood]:
    """Likelihoods in the order of `texts`, on every rank; the same for any number of ranks up to rounding.

    Texts are taken by length, longest first, so that a batch holds little padding; batch j is the same B texts whatever
    the world size, and rank r takes batches r, r + R, ... A rank with no batch left runs one that counts nothing, so
    that every rank makes as many forward passes (each gathers parameters).

    Args:
        model: a causal language model, in whichever mode; it is left as it was.
        texts: at least one.
        batch_size: texts of one forward pass.
        pad_token_id: fills the batch on the right; never attended to.
        device: of the model.

    Memory: logits of a batch in the model's dtype, those of scored tokens in fp32.

    Collectives: those of ZeRO-3's forward, then one all-reduce of two numbers a text; every rank must call it.
    """
    order = sorted(range(len(texts)), key=lambda number: (-len(texts[number].ids), number))
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    sums = [0.0] * len(texts)
    num_not_greedy = [0] * len(texts)
    was_training = model.training
    model.eval()
    for round_start in range(0, len(batches), world_size()):
        index = round_start + rank()
        batch = batches[index] if index < len(batches) else batches[-1][:1]
        log_probabilities_B, not_greedy_B = _score_batch(model, [texts[n] for n in batch], pad_token_id, device)
        if index < len(batches):
            for number, log_probability, num_other in zip(batch, log_probabilities_B, not_greedy_B, strict=True):
                sums[number], num_not_greedy[number] = log_probability, num_other
    model.train(was_training)
    if world_size() > 1:
        reduced = all_reduce_sum([*sums, *num_not_greedy], device)
        sums, num_not_greedy = reduced[: len(texts)], [round(count) for count in reduced[len(texts) :]]
    return [Likelihood(total, count == 0) for total, count in zip(sums, num_not_greedy, strict=True)]


def _score_batch(
    model: Any, texts: Sequence[ScoredText], pad_token_id: int, device: torch.device
) -> tuple[list[float], list[int]]:
    longest = max(len(text.ids) for text in texts)
    shape = (len(texts), -(-longest // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF)
    input_ids_BT = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask_BT = torch.zeros(shape, dtype=torch.int64)
    scored_BT = torch.zeros(shape, dtype=torch.bool)
    for row, (ids, start) in enumerate(texts):
        input_ids_BT[row, : len(ids)] = torch.tensor(ids)
        attention_mask_BT[row, : len(ids)] = 1
        scored_BT[row, start : len(ids)] = True
    input_ids_BT = input_ids_BT.to(device)
    scored_BT = scored_BT.to(device)
    logits_BTV = model(input_ids=input_ids_BT, attention_mask=attention_mask_BT.to(device), use_cache=False).logits
    # Token t is predicted at t - 1.
    scored_BT = scored_BT[:, 1:]
    logits_NV: Tensor = logits_BTV[:, :-1][scored_BT].float()
    targets_N = input_ids_BT[:, 1:][scored_BT]
    rows_N = scored_BT.nonzero()[:, 0]
    log_probabilities_N = -F.cross_entropy(logits_NV, targets_N, reduction="none").double()
    not_greedy_N = (logits_NV.argmax(-1) != targets_N).double()
    zeros_B = torch.zeros(len(texts), dtype=torch.float64, device=device)
    return (
        zeros_B.index_add(0, rows_N, log_probabilities_N).tolist(),
        [int(count) for count in zeros_B.index_add(0, rows_N, not_greedy_N).tolist()],
    )
