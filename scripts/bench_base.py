"""A frozen Llama base with random weights, in memory, shared by all the models that a benchmark compares.

No file and no download: shapes by name, as many layers of them as wanted. Each model is a module tree of its own whose
frozen parameters are the tensors of one `FrozenBase`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from llama_on_disk import STANDARD_DEVIATION, LlamaShape
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparse_ds.kernels.nf4 import quantize_nf4
from sparse_ds.training.setup import checkpoint_activations

SHAPES = {
    "tiny": LlamaShape(64, 192, 2, 4, 2, 256),
    "1024": LlamaShape(1024, 2816, 24, 16, 16, 32_000),
    "2048": LlamaShape(2048, 5632, 22, 32, 32, 32_000),
    "llama-2-7b": LlamaShape(4096, 11_008, 32, 32, 32, 32_000),
    "llama-2-13b": LlamaShape(5120, 13_824, 40, 40, 40, 32_000),
    "llama-2-70b": LlamaShape(8192, 28_672, 80, 64, 8, 32_000),
}
VOCABULARY_STEP = 64
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IS_TARGET = re.compile(rf"\.({'|'.join(TARGETS)})\.weight$")


def shape_of(name: str, num_layers: int | None) -> LlamaShape:
    """So many layers of a shape. The vocabulary is cut with them, so that embeddings and head keep their share of the
    model: a short model with a whole vocabulary would hide what the layers cost."""
    whole = SHAPES[name]
    if num_layers is None or num_layers == whole.layers:
        return whole
    vocabulary = whole.vocab * num_layers // whole.layers // VOCABULARY_STEP * VOCABULARY_STEP
    return whole._replace(layers=num_layers, vocab=max(vocabulary, VOCABULARY_STEP))


@dataclass(frozen=True)
class FrozenBase:
    """The tensors of the base by name: `weight`, or of a target matrix in NF4 `packed` and `absmax`."""

    shape: LlamaShape
    dtype: torch.dtype
    nf4: bool
    device: torch.device
    tensors: dict[str, dict[str, Tensor]]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for roles in self.tensors.values() for tensor in roles.values())

    def empty_model(self, *, checkpointing: bool) -> PreTrainedModel:
        """The architecture, all parameters on the meta device, in training mode."""
        config = self.shape.config()
        config.use_cache = False
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        model.train()
        if checkpointing:
            checkpoint_activations(model)
        return model

    def fill(self, model: nn.Module) -> None:
        """Put the tensors into a model from `empty_model`, frozen: NF4 matrices as bitsandbytes' `Linear4bit`."""
        for name, roles in self.tensors.items():
            module_name, _, child = name.rpartition(".")
            if "packed" in roles:
                parent_name, _, own_name = module_name.rpartition(".")
                linear = self._linear4bit(roles, model.get_submodule(module_name))
                setattr(model.get_submodule(parent_name), own_name, linear)
            else:
                model.get_submodule(module_name).register_parameter(child, Parameter(roles["weight"], False))
        move_buffers(model, self.device)

    def _linear4bit(self, roles: dict[str, Tensor], empty: nn.Module) -> nn.Module:
        # Here, for it takes seconds to import.
        import bitsandbytes as bnb

        from sparse_ds.kernels.nf4 import BLOCK_SIZE, nf4_code

        assert isinstance(empty, nn.Linear)
        num_rows, num_cols = empty.out_features, empty.in_features
        with torch.device("meta"):
            made = bnb.nn.Linear4bit(num_cols, num_rows, bias=False, compute_dtype=self.dtype, quant_type="nf4")
        state = bnb.functional.QuantState(
            absmax=roles["absmax"],
            shape=torch.Size((num_rows, num_cols)),
            dtype=self.dtype,
            blocksize=BLOCK_SIZE,
            code=nf4_code(self.device),
            quant_type="nf4",
        )
        made.weight = bnb.nn.Params4bit(
            roles["packed"].view(-1, 1), quant_state=state, quant_type="nf4", module=made, bnb_quantized=True
        )
        made.quant_state = state
        return made


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move the buffers (rotary frequencies); parameters stay where they are."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def random_base(shape: LlamaShape, dtype: torch.dtype, *, nf4: bool, device: torch.device) -> FrozenBase:
    """Weights ~ N(0, 0.02^2), norms 1, the same for the same arguments."""
    generator = torch.Generator(device).manual_seed(0)
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, empty in shape.empty_tensors().items():
        if empty.dim() == 1:
            tensors[name] = {"weight": torch.ones(empty.shape, dtype=dtype, device=device)}
            continue
        weight = torch.empty(empty.shape, dtype=dtype, device=device)
        weight.normal_(0, STANDARD_DEVIATION, generator=generator)
        if nf4 and IS_TARGET.search(name):
            quantized = quantize_nf4(weight, double_quantization=False)
            tensors[name] = {"packed": quantized.packed, "absmax": quantized.absmax}
        else:
            tensors[name] = {"weight": weight}
    return FrozenBase(shape, dtype, nf4, device, tensors)


def random_batch(
    shape: LlamaShape, micro_batch_size: int, sequence_length: int, device: torch.device
) -> dict[str, Any]:
    """Random tokens that are all trained on."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(shape.vocab, (micro_batch_size, sequence_length), generator=generator).to(device)
    return {"input_ids": ids, "labels": ids}
