"""The comparison of a merged model with base + adapter: equal where it must be, and it finds what is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_items import Deltas, MakeAdapter, MakeBase, as_items
from safetensors.torch import load_file, save_file

from sparse_ds.adapter.adapter import AdapterConfig
from sparse_ds.adapter.native import load_adapter, save_adapter
from sparse_ds.export.merged import merge_adapter
from sparse_ds.export.quantized import write_nf4_checkpoint
from sparse_ds.export.verify import verify_merged


@pytest.mark.parametrize("quantization", ["none", "nf4", "stored nf4"])
def test_equal_in_every_bit(make_base: MakeBase, make_adapter: MakeAdapter, tmp_path: Path, quantization: str) -> None:
    base = make_base()
    adapter = load_adapter(make_adapter(quantization="none" if quantization == "none" else "nf4"))
    if quantization == "stored nf4":
        write_nf4_checkpoint(base, tmp_path / "nf4")
        base = tmp_path / "nf4"
    for dtype in ("bfloat16", "float32"):
        merge_adapter(base, adapter, tmp_path / dtype, dtype=dtype)
        found = verify_merged(tmp_path / dtype, base, adapter)
        assert found.must_be_equal and found.largest_difference == 0 and found.adapter_loss == found.merged_loss
        assert "equal in every bit" in found.describe()
    merge_adapter(base, adapter, tmp_path / "fp16", dtype="float16")
    assert not verify_merged(tmp_path / "fp16", base, adapter).must_be_equal


def test_another_base_is_seen_and_allowed(make_base: MakeBase, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    base, adapter = make_base(), load_adapter(make_adapter(quantization="nf4"))
    merge_adapter(base, adapter, tmp_path / "merged", base_weights="original")
    found = verify_merged(tmp_path / "merged", base, adapter)
    assert not found.must_be_equal and found.largest_difference > 0
    assert "apart; losses" in found.describe()


def test_a_wrong_merge_is_found(make_base: MakeBase, make_adapter: MakeAdapter, deltas: Deltas, tmp_path: Path) -> None:
    base, adapter = make_base(), load_adapter(make_adapter())
    merge_adapter(base, adapter, tmp_path / "merged")
    path = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(path)
    name, (indices, _) = next(iter(deltas.items()))
    tensors[f"{name}.weight"].view(-1)[int(indices[3])] += 0.5
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"is not the one that was trained: logits .* apart"):
        verify_merged(tmp_path / "merged", base, adapter)


def test_a_classification(make_base: MakeBase, adapter_config: AdapterConfig, deltas: Deltas, tmp_path: Path) -> None:
    update = {"dense_shapes": {"score.weight": (3, 24)}, "task": "sequence_classification", "labels": ("a", "b", "c")}
    config = adapter_config.model_copy(update={**update, "pad_token_id": 0})
    save_adapter(tmp_path / "adapter", as_items(deltas), config=config, dense={"score.weight": torch.randn(3, 24)})
    base, adapter = make_base(), load_adapter(tmp_path / "adapter")
    merge_adapter(base, adapter, tmp_path / "merged", dtype="float32")
    found = verify_merged(tmp_path / "merged", base, adapter)
    assert found.must_be_equal and found.largest_difference == 0
