"""Held-out loss and sample answers under ZeRO-3, with all ranks in step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_ds.distributed.process_group import rank, world_size
from sparse_ds.distributed.zero3_partitions import all_reduce_sum
from sparse_ds.sparse.sparse_linear import SparseLayer
from sparse_ds.training.classification_scores import LabelCounts, scores_of


@dataclass(frozen=True)
class HeldoutResult:
    """`loss` is the mean negative log-likelihood (nats) over the `num_counted` trained tokens of the data, or over its
    samples for a classification."""

    loss: float
    num_counted: int
    hidden_delta_fraction: float | None
    """Share of the non-zero deltas that the rounding of the merged weight hides; None without sparse layers."""
    scores: dict[str, float] = field(default_factory=dict)
    """Of a classification: `classification_scores.scores_of` all samples; else empty."""


@torch.no_grad()
def heldout_loss(
    model: torch.nn.Module,
    dataset: Any,
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    batch_size: int,
    device: torch.device,
) -> HeldoutResult:
    """Mean loss over a dataset, per token (or per sample where `collate` gives one label per sample), independent of
    the number of ranks up to rounding.

    Batch j is rows [j * B, (j + 1) * B) whatever the world size; rank r takes batches r, r + R, ... A rank with no
    batch left runs one that counts nothing, so every rank makes as many forward passes (each gathers parameters).

    Collectives: those of ZeRO-3's forward, then one all-reduce; every rank must call it.
    """
    num_batches = -(-len(dataset) // batch_size)
    layers = [module for module in model.modules() if isinstance(module, SparseLayer)]
    was_training = model.training
    model.eval()
    total_nll, num_counted = 0.0, 0
    counts_of_labels: LabelCounts | None = None
    for round_start in range(0, num_batches, world_size()):
        index = round_start + rank()
        counts = index < num_batches
        first = index * batch_size if counts else 0
        rows = [dataset[i] for i in range(first, min(first + batch_size, len(dataset)))]
        batch = {name: tensor.to(device) for name, tensor in collate(rows).items()}
        labels = batch.pop("labels")
        for layer in layers:
            layer.count_hidden = round_start == 0
        logits = model(**batch, use_cache=False).logits.float()
        if labels.dim() == 1 and counts_of_labels is None:
            counts_of_labels = LabelCounts(logits.shape[-1])
        if counts:
            if counts_of_labels is not None:
                counts_of_labels.add(logits, labels)
            else:
                logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            total_nll += float(F.cross_entropy(logits, labels, reduction="sum"))
            num_counted += int((labels != -100).sum())
    for layer in layers:
        layer.count_hidden = False
    model.train(was_training)
    of_labels: list[float] = [] if counts_of_labels is None else counts_of_labels.numbers()
    total_nll, all_counted, *of_labels = all_reduce_sum([total_nll, num_counted, *of_labels], device)
    scores = scores_of(of_labels) if of_labels else {}
    return HeldoutResult(total_nll / all_counted, int(all_counted), _hidden_fraction(layers), scores)


def _hidden_fraction(layers: list[SparseLayer]) -> float | None:
    if not layers:
        return None
    hidden = sum(layer.hidden_deltas[0] for layer in layers)
    nonzero = sum(layer.hidden_deltas[1] for layer in layers)
    return hidden / nonzero if nonzero else 0.0


@torch.no_grad()
def sample_answer(model: Any, tokenizer: Any, prompt_ids: list[int], max_new_tokens: int, device: torch.device) -> str:
    """Greedy answer to one prompt.

    Collectives: those of ZeRO-3's forward for every token; every rank must call it with the same prompt. All ranks
    compute the same tokens, so all stop at the same one.
    """
    was_training = model.training
    model.eval()
    input_ids = torch.tensor([prompt_ids], device=device)
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        synced_gpus=world_size() > 1,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    model.train(was_training)
    answer: str = tokenizer.decode(output[0, len(prompt_ids) :], skip_special_tokens=True)
    return answer.strip()
