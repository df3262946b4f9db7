"""What the tests against a dense oracle share: the model and its data, the start of an oracle, a run's configuration.

The initial random indices are an input here, not under test: the oracle takes them from `random_subset`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from dense_oracle import RunSettings
from tiny_llama_runs import EVAL_SAMPLES, TRAIN_SAMPLES, Sample, make_samples, save_samples, save_tiny_llama
from torch import Tensor
from transformers import LlamaForCausalLM

from sparse_ds.selection.random_subset import random_subset

# 49 of the 32 x 36, 24 of the 16 x 36 and 71 of the 46 x 36 weights of a matrix.
DENSITY = 0.043


@dataclass(frozen=True)
class Material:
    """A folder with the model and two data sets: texts, of which all is learned, and prompts with completions."""

    folder: Path
    samples: dict[str, tuple[list[Sample], list[Sample]]]

    @classmethod
    def save(cls, folder: Path, *, model_seed: int, attention_bias: bool = True) -> Material:
        save_tiny_llama(folder / "model", seed=model_seed, attention_bias=attention_bias)
        samples = {}
        for name, with_prompts in (("texts", False), ("prompts", True)):
            training = make_samples(TRAIN_SAMPLES, seed=1, with_prompts=with_prompts)
            heldout = make_samples(EVAL_SAMPLES, seed=2, with_prompts=with_prompts)
            save_samples(training, folder / f"{name}_train.jsonl")
            save_samples(heldout, folder / f"{name}_eval.jsonl")
            samples[name] = (training, heldout)
        return cls(folder, samples)


@dataclass(frozen=True)
class Start:
    """The arguments of an oracle in front of the samples."""

    model: LlamaForCausalLM
    bases: dict[str, Tensor]
    initial_indices: dict[str, Tensor]

    @classmethod
    def load(
        cls,
        material: Material,
        *,
        seed: int,
        nf4: bool = False,
        dtype: torch.dtype = torch.float32,
        density: float = DENSITY,
    ) -> Start:
        """All linear layers inside the blocks; the head and the embeddings stay as they are."""
        model = LlamaForCausalLM.from_pretrained(material.folder / "model", dtype=dtype, attn_implementation="eager")
        linears = {name: module for name, module in model.named_modules() if name.endswith("_proj")}
        assert len(linears) == 14
        bases, initial = {}, {}
        for name, linear in linears.items():
            weight_OI = linear.weight.detach().float().clone()
            bases[name] = through_nf4(weight_OI) if nf4 else weight_OI
            num_active = int(density * weight_OI.numel())
            initial[name] = random_subset(weight_OI.numel(), num_active, seed=seed, name=name)
        return cls(model, bases, initial)


def run_config(
    folder: Path,
    settings: RunSettings,
    data: str,
    *,
    method: dict[str, Any],
    optimizer: dict[str, Any],
    quantization: str = "none",
    dtype: str = "float32",
    density: float = DENSITY,
    micro_batch_size: int = 1,
) -> dict[str, Any]:
    """The configuration of the run that `settings` describe, with what the method adds to two sections."""
    return {
        "model": {"name_or_path": str(folder / "model"), "quantization": quantization, "dtype": dtype},
        "data": {
            "train": str(folder / f"{data}_train.jsonl"),
            "eval": str(folder / f"{data}_eval.jsonl"),
            "sequence_length": 32,
        },
        "method": {"density": density, **method},
        "optimizer": {
            "learning_rate": settings.learning_rate,
            "weight_decay": settings.weight_decay,
            "eps": settings.eps,
            "max_grad_norm": settings.max_grad_norm,
            "schedule": "linear",
            "warmup_fraction": settings.warmup_fraction,
            **optimizer,
        },
        "train": {
            "max_steps": settings.total_steps,
            "micro_batch_size": micro_batch_size,
            "global_batch_size": settings.global_batch_size,
            "eval_interval_steps": settings.eval_interval_steps,
            "seed": settings.seed,
            "device": "cpu",
            "cpu_threads": 1,
        },
        "export": {"merged": False},
        "monitor": {"num_sample_prompts": 0, "progress_bar": False},
    }


def event_keys(settings: RunSettings) -> dict[str, Any]:
    """The configuration of the events."""
    return {
        "interval_steps": settings.interval_steps,
        "estimation_steps": settings.estimation_steps,
        "initial_drop_fraction": settings.initial_drop_fraction,
    }


def through_nf4(weight_OI: Tensor) -> Tensor:
    """What is left of a matrix after NF4 in blocks of 64, by bitsandbytes."""
    # Flat: its CPU kernel takes wrong scales for matrices whose rows do not end with a block.
    packed, state = bnb.quantize_4bit(weight_OI.reshape(-1), blocksize=64, quant_type="nf4")
    return bnb.dequantize_4bit(packed, state).view(weight_OI.shape)


def largest_difference(left: list[float], right: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(left, right, strict=True))
