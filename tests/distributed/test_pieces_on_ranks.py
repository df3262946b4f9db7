"""The loss in chunks, compiled pieces, and a base that waits on the host, under ZeRO-3 on two ranks that gather block
by block, against the dense model of transformers in one process."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from ranks import run_ranks
from torch import Tensor
from transformers import AutoModelForCausalLM

from sparse_ds.config import RunConfig, build_deepspeed_config
from sparse_ds.distributed.process_group import rank, world_size
from sparse_ds.embedded import resolve_model
from sparse_ds.model import chunked_loss
from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.model.find_base_model import find_base_model
from sparse_ds.selection.random_subset import random_subset
from sparse_ds.training.setup import make_optimizer, prepare_model

LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")
DENSITY, NUM_RANKS, ROWS, LENGTH, NUM_TOKENS = 0.01, 2, 2, 24, 50
TOKENS_IN_CHUNK = 7
# fp32: sums of some hundred terms in another order; the gradients' largest entries are about 0.1.
TOLERANCE = 1e-5


def batch_of(rank: int, vocab_size: int) -> dict[str, Tensor]:
    ids = torch.randint(3, vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(rank))
    labels = ids.clone()
    labels[0, : 5 + rank] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def one_step(settings: dict[str, Any], zero: dict[str, Any] | None = None) -> tuple[float, dict[str, list[float]]]:
    """Loss of this rank, and the gradients of the values of two layers."""
    config = RunConfig.model_validate(
        {
            "model": {"dtype": "float32", "quantization": "none"},
            "method": {"density": DENSITY},
            "optimizer": {"learning_rate": 0.01, "max_grad_norm": 0.0},
            "train": {"output_dir": "unused", "micro_batch_size": ROWS, **settings},
            "deepspeed": {"zero_optimization": zero or {}},
        }
    )
    prepared = prepare_model(config, BaseCheckpoint(find_base_model("embedded", None)), torch.device("cpu"))
    assert prepared.gathered_block is not None
    model: Any = prepared.model
    optimizer = make_optimizer(config, [layer.values for layer in prepared.layers.values()])
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=build_deepspeed_config(config, world_size(), 64, prepared.gathered_block),
    )
    batch = batch_of(rank(), model.config.vocab_size)
    chunked_loss.CHUNK_ELEMENTS["cpu"] = TOKENS_IN_CHUNK * model.config.vocab_size
    loss = engine(**batch, use_cache=False, num_items_in_batch=torch.tensor(NUM_TOKENS)).loss
    engine.backward(loss)
    gradients = {name: safe_get_full_grad(prepared.layers[name].values).tolist() for name in LAYERS}
    return float(loss.detach()), gradients


def all_variants() -> dict[str, tuple[float, dict[str, list[float]]]]:
    return {
        "checkpointing": one_step({"gradient_checkpointing": True}),
        "partitions on the host": one_step(
            {"gradient_checkpointing": True}, {"offload_param": {"device": "cpu", "pin_memory": False}}
        ),
        # Last: the rotary embedding stays exchanged in this process.
        "compiled, checkpointing": one_step({"compile": True, "gradient_checkpointing": True}),
    }


def test_losses_and_gradients_are_those_of_the_dense_model() -> None:
    found = run_ranks(NUM_RANKS, all_variants, timeout_s=400.0)
    model = AutoModelForCausalLM.from_pretrained(resolve_model("embedded"), dtype=torch.float32)
    losses = []
    for position in range(NUM_RANKS):
        loss = model(**batch_of(position, model.config.vocab_size), num_items_in_batch=torch.tensor(NUM_TOKENS)).loss
        # The engine averages over the ranks.
        (loss / NUM_RANKS).backward()
        losses.append(float(loss.detach()))
    for position, variants in enumerate(found):
        for variant, (loss, gradients) in variants.items():
            assert loss == pytest.approx(losses[position], abs=TOLERANCE), variant
            for name, gradient in gradients.items():
                gradient_K = torch.tensor(gradient)
                dense_N = model.get_parameter(f"{name}.weight").grad.flatten()
                indices = random_subset(dense_N.numel(), gradient_K.numel(), seed=0, name=name)
                torch.testing.assert_close(gradient_K, dense_N[indices], rtol=TOLERANCE, atol=TOLERANCE)
