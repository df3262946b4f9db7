"""Supertuning adapters in stock PEFT and transformers, against the trained model as plain torch makes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftModel
from peft_models import LABELS, SHAPES, TOKENS, edited_model, logits, make_adapter, make_base
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sparse_ds.adapter.adapter import Adapter, AdapterConfig
from sparse_ds.adapter.peft_formats.supertuning import SupertuningAdapter, save_supertuning
from sparse_ds.export.merged import merge_adapter


def with_adapter(how: str, base: Path, folder: Path, dtype: torch.dtype) -> Any:
    if how == "PeftModel":
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), folder)
    if how == "AutoPeftModel":
        return AutoPeftModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if how == "AutoModel":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model.load_adapter(folder)
    return model


def assert_same_adapter(found: Adapter, expected: Adapter) -> None:
    assert found.config == AdapterConfig(
        **{name: getattr(expected.config, name) for name in AdapterConfig.model_fields}
    )
    for (name, ours), (expected_name, theirs) in zip(found.items(), expected.items(), strict=True):
        assert name == expected_name
        for one, other in zip(ours, theirs, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other), name


@pytest.mark.parametrize("tied", [False, True])
def test_in_fp32_every_loader_gives_the_trained_model_bit_for_bit(tmp_path: Path, tied: bool) -> None:
    base = make_base(tmp_path / "base", tied=tied)
    adapter = make_adapter(tmp_path / "adapter", base)
    report = save_supertuning(adapter, tmp_path / "peft")
    assert report.num_deltas == 3936 and report.num_padding > 0 and not report.warnings
    expected = edited_model(base, adapter, torch.float32)
    for how in ("PeftModel", "AutoPeftModel", "AutoModel", "load_adapter"):
        model = with_adapter(how, base, tmp_path / "peft", torch.float32)
        assert torch.equal(logits(model), logits(expected)), how
        wrapped = [name for name, module in model.named_modules() if hasattr(module, "supertuning_values")]
        assert {name.removeprefix("base_model.model.") for name in wrapped} == SHAPES.keys() - {
            "model.layers.0.mlp.down_proj"
        }, how
    merged = with_adapter("PeftModel", base, tmp_path / "peft", torch.float32).merge_and_unload()
    merge_adapter(base, adapter, tmp_path / "merged", dtype="float32")
    canonical = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert merged.state_dict().keys() == canonical.keys()
    for name, weight in merged.state_dict().items():
        assert torch.equal(weight, canonical[name]), name
    assert_same_adapter(SupertuningAdapter(tmp_path / "peft"), adapter)


@pytest.mark.parametrize(("scale", "share"), [(1e-4, (0.002, 0.02)), (3e-4, (0.01, 0.04)), (1e-2, (0.15, 0.32))])
def test_in_bf16_peft_rounds_twice(tmp_path: Path, scale: float, share: tuple[float, float]) -> None:
    """PEFT: bf16(w + bf16(value)); trained: bf16(w + value). The value moves by half a unit of its last place at most,
    |value| 2^-8, and each sum by half a unit of its own, |sum| 2^-8."""
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dtype="bfloat16", scale=scale, all_linear=True)
    save_supertuning(adapter, tmp_path / "peft")
    expected = edited_model(base, adapter, torch.bfloat16)
    model = with_adapter("PeftModel", base, tmp_path / "peft", torch.bfloat16)
    running = logits(model)
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), running)
    num_differing = num_active = 0
    for name, (indices, values) in adapter.items():
        found, trained = (one.get_submodule(name).weight.data.view(-1) for one in (merged, expected))
        changed = torch.zeros(found.numel(), dtype=torch.bool)
        changed[indices.long()] = True
        assert torch.equal(found[~changed], trained[~changed])
        theirs, ours, values = found[indices.long()].double(), trained[indices.long()].double(), values.double()
        assert bool(((theirs - ours).abs() <= (values.abs() + theirs.abs() + ours.abs()) / 256).all()), name
        num_differing += int((theirs != ours).sum())
        num_active += indices.numel()
    assert share[0] < num_differing / num_active < share[1]


def test_a_classifier(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, classifier=True)
    save_supertuning(adapter, tmp_path / "peft")
    merge_adapter(base, adapter, tmp_path / "merged", dtype="float32")
    expected = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    settings = {"num_labels": len(LABELS), "pad_token_id": 3, "dtype": torch.float32}
    loaded = [
        AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "peft", **settings),
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "peft", **settings),
    ]
    tokens = torch.cat([TOKENS, torch.full((2, 2), 3)], dim=1)
    with torch.no_grad():
        for model in loaded:
            assert torch.equal(model(tokens).logits, expected(tokens).logits)
    assert_same_adapter(SupertuningAdapter(tmp_path / "peft"), adapter)
    head = SupertuningAdapter(tmp_path / "peft").read_dense("score.weight")
    assert torch.equal(head, adapter.read_dense("score.weight"))
    assert (tmp_path / "peft" / "adapter_config.json").read_text().count('"SEQ_CLS"') == 1


@pytest.mark.parametrize("classifier", [False, True])
def test_the_lines_of_the_model_card_run(tmp_path: Path, classifier: bool) -> None:
    base = make_base(tmp_path / "base")
    save_supertuning(make_adapter(tmp_path / "adapter", base, classifier=classifier), tmp_path / "peft")
    card = (tmp_path / "peft" / "README.md").read_text()
    assert str(tmp_path) not in card
    code = card.partition("```python\n")[2].partition("```")[0]
    code = code.replace("path/to/this/folder", str(tmp_path / "peft")).replace("path/to/base", str(base))
    names: dict[str, Any] = {}
    exec(code, names)
    assert isinstance(names["model"], PeftModel)
    if classifier:
        assert names["model"].config.id2label == dict(enumerate(LABELS))
