"""The difference of two checkpoints: merged into the base it is the fine-tuned one again."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_items import MakeBase
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sparse_ds.adapter.difference import DifferenceAdapter
from sparse_ds.adapter.native import load_adapter, save_adapter
from sparse_ds.config.errors import UserError
from sparse_ds.export.merged import merge_adapter
from sparse_ds.export.quantized import write_nf4_checkpoint

Q_PROJ, UP_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
NORM, BIAS = "model.layers.1.input_layernorm", f"{Q_PROJ}.bias"


def change_some(tensor: Tensor, scale: float, generator: torch.Generator, *, replace: bool) -> Tensor:
    is_changed = torch.rand(tensor.shape, generator=generator) < 0.3
    noise = torch.randn(tensor.shape, generator=generator) * scale
    return torch.where(is_changed, noise if replace else tensor + noise, tensor)


def make_pair(
    make_base: MakeBase,
    folder: Path,
    *,
    names: tuple[str, ...] = (f"{Q_PROJ}.weight", f"{UP_PROJ}.weight", f"{NORM}.weight", BIAS),
    base_dtype: torch.dtype = torch.float32,
    tuned_dtype: torch.dtype = torch.float32,
    scale: float = 0.01,
    replace: bool = False,
    **sizes: Any,
) -> tuple[Path, Path]:
    """A base, and a copy of which a third of the entries of `names` have other numbers."""
    model = AutoModelForCausalLM.from_pretrained(make_base(attention_bias=True, **sizes))
    for dtype, name in ((base_dtype, "base"), (tuned_dtype, "tuned")):
        model.to(base_dtype).to(dtype)
        if name == "tuned":
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for tensor_name in names:
                    tensor = model.get_parameter(tensor_name)
                    tensor.copy_(change_some(tensor.float(), scale, generator, replace=replace))
        model.save_pretrained(folder / name)
        for path in (folder / "llama_base").glob("*token*"):
            (folder / name / path.name).write_bytes(path.read_bytes())
    return folder / "base", folder / "tuned"


def assert_merge_gives(base: Path, adapter: DifferenceAdapter, tuned: Path, folder: Path, dtype: torch.dtype) -> None:
    merge_adapter(base, adapter, folder, dtype=str(dtype).removeprefix("torch."))
    merged, expected = load_file(folder / "model.safetensors"), load_file(tuned / "model.safetensors")
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert merged[name].dtype == tensor.dtype and torch.equal(merged[name], tensor), name


@pytest.mark.parametrize(
    ("base_dtype", "tuned_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_merged_it_is_the_tuned_checkpoint_bit_for_bit(
    make_base: MakeBase, tmp_path: Path, base_dtype: torch.dtype, tuned_dtype: torch.dtype, tied: bool
) -> None:
    dtypes = {"base_dtype": base_dtype, "tuned_dtype": tuned_dtype}
    base, tuned = make_pair(make_base, tmp_path, scale=1e-4, tied=tied, **dtypes)
    adapter = DifferenceAdapter(base, tuned)
    assert {Q_PROJ, UP_PROJ, BIAS} <= adapter.config.shapes.keys()
    assert adapter.config.base.dtype == ("bfloat16" if tuned_dtype == torch.bfloat16 else "float32")
    assert adapter.config.shapes[BIAS] == (24, 1) and adapter.config.dense_shapes == {} and adapter.left == []
    assert adapter.num_inexact == 0
    assert_merge_gives(base, adapter, tuned, tmp_path / "merged", tuned_dtype)


def test_large_changes_in_bf16_too(make_base: MakeBase, tmp_path: Path) -> None:
    dtypes = {"base_dtype": torch.bfloat16, "tuned_dtype": torch.bfloat16}
    base, tuned = make_pair(make_base, tmp_path, scale=1.0, replace=True, **dtypes)
    adapter = DifferenceAdapter(base, tuned)
    assert adapter.num_inexact == 0 and adapter.config.shapes.keys() == {Q_PROJ, UP_PROJ, NORM, BIAS}
    assert_merge_gives(base, adapter, tuned, tmp_path / "merged", torch.bfloat16)
    # As any adapter it goes through the native file.
    items = [(name, *deltas) for name, deltas in adapter.items()]
    save_adapter(tmp_path / "native", items, config=adapter.config)
    assert load_adapter(tmp_path / "native").index_hash == adapter.index_hash


def test_what_no_fp32_value_gives_back(make_base: MakeBase, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, tuned = make_pair(make_base, tmp_path, scale=0.02, replace=True)
    with caplog.at_level(logging.WARNING, "sparse_ds"):
        adapter = DifferenceAdapter(base, tuned)
    assert (
        f"of {adapter.num_changed} weights that differ, no fp32 value gives {adapter.num_inexact} back" in caplog.text
    )
    merge_adapter(base, adapter, tmp_path / "merged", dtype="float32")
    merged, expected = load_file(tmp_path / "merged/model.safetensors"), load_file(tuned / "model.safetensors")
    num_different = 0
    for name, tensor in expected.items():
        error = (merged[name].double() - tensor.double()).abs()
        original = load_file(base / "model.safetensors")[name].double()
        # Half a unit in the last place of the value, and of the sum.
        assert bool((error <= 2**-24 * ((tensor.double() - original).abs() + tensor.double().abs())).all()), name
        num_different += int((merged[name] != tensor).sum())
    assert num_different == adapter.num_inexact > 0


def test_no_other_value_would_do_better() -> None:
    """Of random pairs about a third is not given back; nor would it be by one of the values nearby."""
    generator = torch.Generator().manual_seed(0)
    base, tuned = torch.randn(100_000, generator=generator), torch.randn(100_000, generator=generator)
    values = tuned - base
    is_missed = base + values != tuned
    assert 0.2 < float(is_missed.float().mean()) < 0.5
    for direction in (math.inf, -math.inf):
        candidate = values[is_missed]
        for _ in range(3):
            candidate = torch.nextafter(candidate, torch.tensor(direction))
            assert not bool((base[is_missed] + candidate == tuned[is_missed]).any())
    assert torch.equal(
        (base.bfloat16().float() + (tuned.bfloat16().float() - base.bfloat16().float())).bfloat16(), tuned.bfloat16()
    )


@pytest.mark.parametrize("density", [0.001, 0.1, 1.0])
def test_the_largest_differences(make_base: MakeBase, tmp_path: Path, density: float) -> None:
    base, tuned = make_pair(make_base, tmp_path, scale=0.01)
    tensors = load_file(tuned / "model.safetensors")
    originals = load_file(base / "model.safetensors")
    originals[f"{UP_PROJ}.weight"] = originals[f"{UP_PROJ}.weight"].bfloat16().float()
    tensors[f"{UP_PROJ}.weight"] = originals[f"{UP_PROJ}.weight"] + 0.25  # nearly all differ by the same
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    save_file(originals, base / "model.safetensors", metadata={"format": "pt"})
    adapter = DifferenceAdapter(base, tuned, density=density)
    assert adapter.config.density == density
    for name in (Q_PROJ, UP_PROJ, NORM, BIAS):
        tensor_name = name if name == BIAS else f"{name}.weight"
        difference = (tensors[tensor_name] - originals[tensor_name]).flatten().tolist()
        is_vector = name in (NORM, BIAS)
        num_wanted = max(int(density * len(difference) + 1e-9), 1 if is_vector else 0)
        order = sorted(range(len(difference)), key=lambda index: (-abs(difference[index]), index))
        expected = sorted(index for index in order[:num_wanted] if difference[index] != 0)
        assert (name in adapter.config.shapes) == bool(expected)
        if expected:
            indices, values = adapter.read(name)
            assert indices.tolist() == expected and indices.dtype == torch.int32
            assert values.tolist() == pytest.approx([difference[index] for index in expected], rel=1e-6)


def test_embeddings_and_head(make_base: MakeBase, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = (f"{Q_PROJ}.weight", "model.embed_tokens.weight", "lm_head.weight")
    dtypes = {"base_dtype": torch.bfloat16, "tuned_dtype": torch.bfloat16}
    base, tuned = make_pair(make_base, tmp_path, names=names, **dtypes)
    with pytest.raises(UserError, match=r"2 tensor\(s\) that hold no deltas differ: .*embed_tokens.*, lm_head\.weight"):
        DifferenceAdapter(base, tuned)
    with caplog.at_level(logging.WARNING, "sparse_ds"):
        left = DifferenceAdapter(base, tuned, others="leave")
    assert left.left == list(names[1:]) and "they are left at the base's numbers" in caplog.text
    assert left.config.dense_shapes == {}
    whole = DifferenceAdapter(base, tuned, others="dense")
    assert whole.config.dense_shapes == {names[1]: (40, 24), names[2]: (40, 24)} and whole.left == []
    assert_merge_gives(base, whole, tuned, tmp_path / "merged", torch.bfloat16)


def test_a_classifier(make_base: MakeBase, tmp_path: Path) -> None:
    base, tuned = make_pair(make_base, tmp_path)
    settings = {"num_labels": 3, "pad_token_id": 2, "id2label": {0: "no", 1: "yes", 2: "maybe"}}
    AutoModelForSequenceClassification.from_pretrained(tuned, **settings).save_pretrained(tmp_path / "classifier")
    adapter = DifferenceAdapter(base, tmp_path / "classifier")
    assert (adapter.config.task, adapter.config.labels) == ("sequence_classification", ("no", "yes", "maybe"))
    assert adapter.config.dense_shapes == {"score.weight": (3, 24)} and adapter.config.pad_token_id == 2
    merge_adapter(base, adapter, tmp_path / "merged", dtype="float32")
    models = [AutoModelForSequenceClassification.from_pretrained(tmp_path / name) for name in ("merged", "classifier")]
    assert torch.equal(models[0].score.weight, models[1].score.weight)
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.allclose(models[0](tokens).logits, models[1](tokens).logits, rtol=1e-5, atol=1e-6)


def test_equal_checkpoints(make_base: MakeBase, tmp_path: Path) -> None:
    base, tuned = make_pair(make_base, tmp_path, names=())
    with pytest.raises(UserError, match=r"No linear layer, norm or bias of '.*tuned' differs from '.*base'"):
        DifferenceAdapter(base, tuned)


@pytest.mark.parametrize(("which", "value"), [("base", math.nan), ("tuned", math.inf)])
@pytest.mark.parametrize("name", [f"{UP_PROJ}.weight", "model.embed_tokens.weight"])
def test_numbers_that_are_not_finite(make_base: MakeBase, tmp_path: Path, which: str, value: float, name: str) -> None:
    folders = dict(zip(("base", "tuned"), make_pair(make_base, tmp_path), strict=True))
    tensors = load_file(folders[which] / "model.safetensors")
    tensors[name].view(-1)[7] = value
    save_file(tensors, folders[which] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"Tensor '{name}' of '{folders[which]}' holds 1 numbers that are NaN or inf"):
        DifferenceAdapter(folders["base"], folders["tuned"])


def test_checkpoints_that_do_not_go_together(
    make_base: MakeBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, tuned = make_pair(make_base, tmp_path)
    other = make_base("mistral", hidden_size=32)
    with pytest.raises(
        UserError, match=r"of different models: '.*' is \[.*\] in '.*base' and \[.*\] in '.*mistral_base"
    ):
        DifferenceAdapter(base, other)
    with pytest.raises(UserError, match=r"of different models: 'model\.layers\.2\..*' is no such tensor in"):
        DifferenceAdapter(base, make_base(attention_bias=True, num_hidden_layers=3))
    with pytest.raises(UserError, match=r"The base checkpoint '.*nowhere' cannot be read: .* which is no folder"):
        DifferenceAdapter(tmp_path / "nowhere", tuned)
    with pytest.raises(UserError, match=r"The fine-tuned checkpoint '.*nowhere' cannot be read"):
        DifferenceAdapter(base, tmp_path / "nowhere")
    write_nf4_checkpoint(base, tmp_path / "nf4")
    with pytest.raises(UserError, match=r"The base checkpoint '.*nf4' is quantized; give it in 16 or 32 bits"):
        DifferenceAdapter(tmp_path / "nf4", tuned)
    with pytest.raises(UserError, match=r"density is 1\.5; expected a share above 0, at most 1"):
        DifferenceAdapter(base, tuned, density=1.5)
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with caplog.at_level(logging.WARNING, "sparse_ds"):
        DifferenceAdapter(base, tuned)
    assert "differ in rms_norm_eps; an adapter holds weights only" in caplog.text
    tensors = load_file(tuned / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"tuned has no tensor 'model\.norm\.weight'"):
        DifferenceAdapter(base, tuned)
