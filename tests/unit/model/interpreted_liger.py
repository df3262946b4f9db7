"""A program: tiny models with Liger's kernels in Triton's interpreter, on the CPU, against transformers' own modules.

Prints one JSON object: case -> largest difference of loss and of any gradient, relative to the largest entry.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import importlib
import json
from typing import Any

import numpy as np
import torch
import triton.language as tl
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, PreTrainedModel
from triton.runtime import interpreter

from sparse_ds.model.liger_pieces import liger_pieces
from sparse_ds.model.pieces import install_pieces

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "use_cache": False,
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=5),
    "gemma2": Gemma2Config(**SIZES, sliding_window=5, query_pre_attn_scalar=8, final_logit_softcapping=3.0),
}


def complete_interpreter() -> None:
    """What Triton 3.9's interpreter lacks: numbers with a type as arguments, and two functions of CUDA's library."""
    convert = interpreter._implicit_cvt

    def with_floats(argument: Any) -> Any:
        if isinstance(argument, float):
            number = np.array([argument], dtype=np.float32)
            return tl.tensor(interpreter.TensorHandle(number, tl.float32), tl.float32)
        return convert(argument)

    interpreter._implicit_cvt = with_floats
    for name in ("rms_norm", "cross_entropy", "geglu"):
        module = importlib.import_module(f"liger_kernel.ops.{name}")
        if hasattr(module, "rsqrt"):
            module.rsqrt = lambda x: tl.rsqrt(x)
        if hasattr(module, "tanh"):
            module.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1


def outcome(model: PreTrainedModel, num_items: int | None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, SIZES["vocab_size"], (2, 9), generator=generator)
    labels = input_ids.clone()
    labels[0, :4] = -100
    divisor = {} if num_items is None else {"num_items_in_batch": torch.tensor(num_items)}
    loss = model(input_ids=input_ids, labels=labels, **divisor).loss
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


def difference(name: str, *, freeze_head: bool, num_items: int | None) -> float:
    torch.manual_seed(3)
    expected = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager", dtype=torch.float32)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager", dtype=torch.float32)
    model.load_state_dict(expected.state_dict())
    for each in (expected, model):
        each.train()
        each.lm_head.weight.requires_grad_(not freeze_head)
    left = outcome(expected, num_items)
    install_pieces(model, liger_pieces())
    right = outcome(model, num_items)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(left, right, strict=True))


def main() -> None:
    torch.set_num_threads(1)
    complete_interpreter()
    cases = [("llama", False, 37), ("mistral", True, 37), ("gemma2", True, None)]
    found = {}
    for name, freeze_head, num_items in cases:
        # Liger's rotary embedding would stay for the reference of the next case.
        code = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        before = code.apply_rotary_pos_emb
        key = f"{name}, {'frozen' if freeze_head else 'trained'} head, {num_items} items"
        found[key] = difference(name, freeze_head=freeze_head, num_items=num_items)
        code.apply_rotary_pos_emb = before
    print(json.dumps(found))


if __name__ == "__main__":
    main()
