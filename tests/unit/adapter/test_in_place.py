"""An adapter switched on and off in a loaded model: the merged model, and then every bit of the base again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapter_items import Deltas, MakeAdapter, MakeBase, as_items
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from sparse_ds.adapter.adapter import AdapterConfig
from sparse_ds.adapter.in_place import InPlaceAdapter
from sparse_ds.adapter.native import load_adapter, save_adapter
from sparse_ds.config.errors import UserError
from sparse_ds.export.merged import merge_adapter

Q_PROJ, DOWN_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
TOKENS = torch.arange(12)[None]


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone().view(-1).view(torch.uint8) for name, tensor in model.state_dict().items()}


def assert_same_bits(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = bits(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_applied_is_merged_and_removed_is_the_base(
    make_base: MakeBase, make_adapter: MakeAdapter, tmp_path: Path, dtype: str
) -> None:
    base, adapter = make_base(), load_adapter(make_adapter(dtype=dtype))
    merge_adapter(base, adapter, tmp_path / "merged", dtype=dtype)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model.model.layers[0].self_attn.q_proj.weight.data[0, 0] = -0.0  # a sign that sums would lose
    before = bits(model)
    in_place = InPlaceAdapter(model, adapter, allow_other_base=True)
    for _ in range(2):
        with in_place:
            assert in_place.is_applied and in_place.apply_s > 0
            merged.model.layers[0].self_attn.q_proj.weight.data[0, 0] = model.model.layers[0].self_attn.q_proj.weight[
                0, 0
            ]
            assert torch.equal(model(TOKENS).logits, merged(TOKENS).logits)
        assert not in_place.is_applied and in_place.remove_s > 0
        assert_same_bits(model, before)


def test_over_a_4_bit_base(make_base: MakeBase, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    base = make_base(hidden_size=64, intermediate_size=128)
    shapes = {Q_PROJ: (64, 64), DOWN_PROJ: (64, 128)}
    generator = torch.Generator().manual_seed(0)
    items = [
        (name, torch.randperm(rows * cols, generator=generator)[:200].sort().values, torch.randn(200) * 0.1)
        for name, (rows, cols) in shapes.items()
    ]
    trained = load_adapter(make_adapter(quantization="nf4")).config
    config = trained.model_copy(update={"shapes": shapes})
    save_adapter(
        tmp_path / "wide", items, config=AdapterConfig(**config.model_dump(include=set(AdapterConfig.model_fields)))
    )
    adapter = load_adapter(tmp_path / "wide")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=quantization)
    layer = model.get_submodule(Q_PROJ)
    # The merged checkpoint of the same adapter has the dequantized weights with the deltas in them.
    merge_adapter(base, adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16).get_submodule(Q_PROJ)
    inputs = torch.randn(3, 64).bfloat16()
    before = packed_bits(layer)
    with torch.no_grad(), InPlaceAdapter(model, adapter):
        assert torch.equal(layer(inputs), merged(inputs))
    assert_equal_parts(packed_bits(layer), before)

    # bitsandbytes' own forward may round the scales to bf16; what it has made of the weights is then the base.
    with torch.no_grad():
        base_output = layer(inputs)
        before = packed_bits(layer)
        with InPlaceAdapter(model, adapter):
            assert not torch.equal(layer(inputs), base_output)
            torch.testing.assert_close(layer(inputs), merged(inputs), rtol=0.05, atol=0.05)
        assert_equal_parts(packed_bits(layer), before)
        assert torch.equal(layer(inputs), base_output)


def packed_bits(layer: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Without `state_dict`, which changes the layer on some CPUs."""
    return layer.weight.data.clone(), layer.weight.quant_state.absmax.clone()


def assert_equal_parts(left: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


def test_adapters_are_taken_out_in_the_opposite_order(
    make_base: MakeBase, make_adapter: MakeAdapter, adapter_config: AdapterConfig, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_base(), dtype=torch.bfloat16)
    before = bits(model)
    first = InPlaceAdapter(model, load_adapter(make_adapter()))
    config = adapter_config.model_copy(update={"shapes": {Q_PROJ: (24, 24)}})
    save_adapter(tmp_path / "other", [(Q_PROJ, torch.arange(576), torch.ones(576))], config=config)
    second = InPlaceAdapter(model, load_adapter(tmp_path / "other"))
    with pytest.raises(RuntimeError, match="is not applied"):
        first.remove()
    first.apply()
    with pytest.raises(RuntimeError, match="is applied already"):
        first.apply()
    second.apply()
    with pytest.raises(RuntimeError, match="is below another one, which has to be removed first"):
        first.remove()
    second.remove()
    first.remove()
    assert_same_bits(model, before)


def test_weights_that_somebody_else_changed_are_not_restored(make_base: MakeBase, make_adapter: MakeAdapter) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_base(), dtype=torch.bfloat16)
    in_place = InPlaceAdapter(model, load_adapter(make_adapter()))
    in_place.apply()
    model.get_submodule(Q_PROJ).weight.data.mul_(2)
    with pytest.raises(RuntimeError, match=rf"'{Q_PROJ}\.weight' was changed since .* \(1 of 2 tensors\)"):
        in_place.remove()
    assert in_place.is_applied


def test_a_head_takes_the_place_of_the_models(
    make_base: MakeBase, adapter_config: AdapterConfig, deltas: Deltas, tmp_path: Path
) -> None:
    update = {"dense_shapes": {"score.weight": (2, 24)}, "task": "sequence_classification", "labels": ("no", "yes")}
    config = adapter_config.model_copy(update={**update, "pad_token_id": 0})
    head = torch.randn(2, 24)
    save_adapter(tmp_path / "adapter", as_items(deltas), config=config, dense={"score.weight": head})
    model = AutoModelForSequenceClassification.from_pretrained(make_base(), num_labels=2, dtype=torch.bfloat16)
    before = bits(model)
    with InPlaceAdapter(model, load_adapter(tmp_path / "adapter")):
        assert torch.equal(model.score.weight, head.bfloat16())
    assert_same_bits(model, before)


def test_a_model_that_does_not_fit(make_base: MakeBase, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = load_adapter(make_adapter())
    other = AutoModelForCausalLM.from_pretrained(make_base(intermediate_size=48), dtype=torch.bfloat16)
    with pytest.raises(UserError, match=rf"'{DOWN_PROJ}\.weight' has shape \[24, 40\]; in this model it has shape"):
        InPlaceAdapter(other, adapter)
    short = AutoModelForCausalLM.from_pretrained(make_base(num_hidden_layers=1), dtype=torch.bfloat16)
    with pytest.raises(UserError, match=rf"'{DOWN_PROJ}\.weight' has shape \[24, 40\]; in this model it is missing"):
        InPlaceAdapter(short, adapter)


def test_a_model_with_other_weights(make_base: MakeBase, make_adapter: MakeAdapter) -> None:
    base, folder = make_base(), make_adapter(weights_hash="0" * 64)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    with pytest.raises(
        UserError, match=r"whose weights have the hash 0{64}; those of the model have [0-9a-f]{64}"
    ) as e:
        InPlaceAdapter(model, load_adapter(folder))
    found = str(e.value).split("model have ")[1][:64]
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text())
    content["base"]["weights_hash"] = found
    path.write_text(json.dumps(content))
    for dtype in (torch.bfloat16, torch.float32):  # fp32 weights are cast as training casts them
        InPlaceAdapter(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), load_adapter(folder))
