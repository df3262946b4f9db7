"""SHiRA adapters in stock PEFT, over 32-bit, 16-bit and bitsandbytes 4-bit bases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes.nn as bnb
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from peft_models import edited_model, logits, make_adapter, make_base
from transformers import AutoModelForCausalLM

from sparse_ds.adapter.adapter import AdapterConfig
from sparse_ds.adapter.peft_formats.shira import ShiraAdapter, save_shira
from sparse_ds.export.merged import merge_adapter


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """bitsandbytes' offset of double quantization depends on the number of threads."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_the_trained_model_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    base, torch_dtype = make_base(tmp_path / "base"), getattr(torch, dtype)
    adapter = make_adapter(tmp_path / "adapter", base, dtype=dtype)
    save_shira(adapter, tmp_path / "peft")
    expected = edited_model(base, adapter, torch_dtype)
    for model in (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch_dtype), tmp_path / "peft"),
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft", dtype=torch_dtype),
    ):
        assert torch.equal(logits(model), logits(expected))
        merged = model.merge_and_unload()
        for name, weight in merged.state_dict().items():
            assert torch.equal(weight, expected.state_dict()[name]), name
    back = ShiraAdapter(tmp_path / "peft")
    assert back.config == AdapterConfig(**{name: getattr(adapter.config, name) for name in AdapterConfig.model_fields})
    for (name, ours), (_, theirs) in zip(back.items(), adapter.items(), strict=True):
        assert ours.indices.dtype == theirs.indices.dtype and torch.equal(ours.indices, theirs.indices), name
        assert torch.equal(ours.values, theirs.values), name


@pytest.mark.parametrize("all_linear", [False, True])
@pytest.mark.parametrize("double_quantization", [False, True])
def test_over_a_4_bit_base_by_the_lines_of_the_model_card(
    tmp_path: Path, double_quantization: bool, all_linear: bool
) -> None:
    base = make_base(tmp_path / "base")
    trained = {"dtype": "bfloat16", "quantization": "nf4", "double_quantization": double_quantization}
    adapter = make_adapter(tmp_path / "adapter", base, all_linear=all_linear, **trained)
    save_shira(adapter, tmp_path / "peft")
    card = (tmp_path / "peft" / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(tmp_path / "peft")).replace("path/to/base", str(base)), names)
    model: Any = names["model"]
    quantized = {name for name, module in model.base_model.model.named_modules() if isinstance(module, bnb.Linear4bit)}
    assert {name.removesuffix(".base_layer") for name in quantized} == adapter.config.shapes.keys()
    merge_adapter(base, adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    if all_linear:  # every matrix is dequantized and summed as in training
        assert torch.equal(logits(model), logits(merged))
    else:  # one matrix has no deltas, and is multiplied by bitsandbytes in 4 bits
        assert torch.allclose(logits(model), logits(merged), rtol=0, atol=2**-6)
    generator = torch.Generator().manual_seed(2)
    for name, (indices, values) in adapter.items():
        if not values.numel():
            continue
        layer, shape = model.base_model.model.get_submodule(name), adapter.config.shapes[name]
        input_TI = torch.randn(7, shape[1], generator=generator).bfloat16()
        delta = torch.zeros(shape).view(-1)
        delta[indices.long()] = values
        with torch.no_grad():
            found = layer(input_TI)
            # Last, since on some CPUs bitsandbytes' own product packs the weights anew, and PEFT no longer reads them.
            alone = layer.base_layer(input_TI)
        expected = alone.double() + input_TI.double() @ delta.view(shape).double().T
        # Each weight is rounded to bf16 (2^-9 of about 0.02, 192 of them), and so are the two products.
        assert torch.allclose(found.double(), expected, rtol=2**-7, atol=2**-7), name
        assert not torch.equal(found, alone), name


def test_transformers_own_loaders_fail_loudly(tmp_path: Path) -> None:
    """With the mask type "random" they would draw other positions and say nothing."""
    base = make_base(tmp_path / "base")
    save_shira(make_adapter(tmp_path / "adapter", base), tmp_path / "peft")
    with pytest.raises(KeyError):
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "peft", dtype=torch.float32))
