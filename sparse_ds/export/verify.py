"""Compare a merged checkpoint with base + adapter, both run by plain transformers on the same tokens.

Nothing of the merge is used for the second model: the base is loaded as it is (and dequantized by transformers if it is
stored in NF4), brought to the weights that training saw where they were NF4, and the adapter applied in place.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sparse_ds.adapter.adapter import Adapter, tensor_name
from sparse_ds.adapter.in_place import InPlaceAdapter
from sparse_ds.export.checkpoint_writer import DTYPES
from sparse_ds.export.merged import REPORT_FILE
from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.model.find_base_model import find_base_model
from sparse_ds.model.frozen_weight import nf4_round_trip
from sparse_ds.model.stored_nf4 import find_stored_nf4

NUM_SEQUENCES, SEQUENCE_LENGTH = 4, 64


@dataclass(frozen=True)
class Verification:
    """Two models on the same random tokens.

    Attributes:
        num_tokens: of each model's input.
        largest_difference: of all logits.
        adapter_loss, merged_loss: mean cross-entropy of the next token, in nats; of a classification of label 0.
        must_be_equal: no rounding lies between them, and no other base: any difference is a defect.
    """

    num_tokens: int
    largest_difference: float
    adapter_loss: float
    merged_loss: float
    must_be_equal: bool

    def describe(self) -> str:
        """One sentence."""
        kind = "equal in every bit" if self.largest_difference == 0 else f"up to {self.largest_difference:.3g} apart"
        return (
            f"logits of adapter and merged model on {self.num_tokens} random tokens: {kind}; losses "
            f"{self.adapter_loss:.6f} and {self.merged_loss:.6f}"
        )


def verify_merged(
    merged: Path | str, base: str | Path, adapter: Adapter, *, revision: str | None = None, device: str = "cpu"
) -> Verification:
    """Run both models.

    Memory: one whole model at a time, in the dtype of the training.

    Args:
        merged: what `merge_adapter` wrote.
        base: folder or hub name of the base.
        adapter: what was merged.
        revision: of a hub base.
        device: where to run.

    Raises:
        RuntimeError: the models must be equal and are not.
    """
    merged = Path(merged)
    trained_dtype = DTYPES[adapter.config.base.dtype]
    with torch.no_grad():
        expected = _run(_adapted_model(find_base_model(str(base), revision), adapter, trained_dtype, device), device)
        found = _run(_model_class(adapter).from_pretrained(merged, dtype=trained_dtype).to(device), device)
    stored_dtype = DTYPES[json.loads((merged / "config.json").read_text(encoding="utf-8"))["dtype"]]
    report = json.loads((merged / REPORT_FILE).read_text(encoding="utf-8"))
    verification = Verification(
        num_tokens=NUM_SEQUENCES * SEQUENCE_LENGTH,
        largest_difference=float((expected - found).abs().max()),
        adapter_loss=_loss(expected),
        merged_loss=_loss(found),
        must_be_equal=stored_dtype in (trained_dtype, torch.float32) and report["base_weights"] == "dequantized",
    )
    if verification.must_be_equal and verification.largest_difference != 0:
        raise RuntimeError(
            f"The merged model in '{merged}' is not the one that was trained: {verification.describe()}. Do not use it."
        )
    return verification


def _model_class(adapter: Adapter) -> Any:
    return AutoModelForCausalLM if adapter.config.labels is None else AutoModelForSequenceClassification


def _adapted_model(base_folder: Path, adapter: Adapter, dtype: torch.dtype, device: str) -> Any:
    config = adapter.config
    head = {} if config.labels is None else {"num_labels": len(config.labels), "pad_token_id": config.pad_token_id}
    model = _model_class(adapter).from_pretrained(base_folder, dtype=dtype, **head).to(device)
    checkpoint = BaseCheckpoint(base_folder)
    if getattr(model, "is_quantized", False):
        model = model.dequantize()
    if config.base.quantization == "nf4":
        for module_name in config.shapes:
            name = tensor_name(module_name)
            weight = model.get_parameter(name)
            if weight.dim() == 1 or find_stored_nf4(checkpoint, name) is not None:
                continue
            weight.copy_(nf4_round_trip(weight, double_quantization=config.base.double_quantization))
    InPlaceAdapter(model, adapter, allow_other_base=True).apply()
    return model


def _run(model: Any, device: str) -> Tensor:
    """Logits in fp32 on the CPU, of tokens that are the same in every call."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (NUM_SEQUENCES, SEQUENCE_LENGTH), generator=generator)
    logits: Tensor = model(tokens.to(device)).logits
    return logits.float().cpu()


def _loss(logits: Tensor) -> float:
    if logits.dim() == 2:
        return float(F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long)))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(logits.shape[-1], logits.shape[:2], generator=generator)
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))
