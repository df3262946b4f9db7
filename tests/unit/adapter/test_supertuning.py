"""Supertuning folders: what is written, what comes back, what PEFT itself writes, and every kind of damage."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_items import Deltas, MakeAdapter, MakeBase, as_items
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, SupertuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sparse_ds.adapter.adapter import Adapter, AdapterConfig
from sparse_ds.adapter.native import load_adapter, save_adapter
from sparse_ds.adapter.peft_formats.supertuning import (
    SupertuningAdapter,
    find_sparsity,
    num_peft_entries,
    save_supertuning,
)
from sparse_ds.adapter.peft_formats.writing import PREFIX, RECORD_FILE
from sparse_ds.config.errors import UserError
from sparse_ds.export.merged import merge_adapter

Q_PROJ, DOWN_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TOKENS = torch.arange(12).view(2, 6)


@given(st.dictionaries(st.text(), st.tuples(st.integers(1, 2**31), st.integers(1, 2**31)), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_one_sparsity_gives_every_matrix_its_entries(pairs: dict[str, tuple[int, int]]) -> None:
    wanted = {name: (min(pair), max(pair)) for name, pair in pairs.items()}
    sparsity = find_sparsity(wanted)
    SupertuningConfig(sparsity=json.loads(json.dumps(sparsity)))  # PEFT accepts it
    found = {name: num_peft_entries(num_elements, sparsity) for name, (_, num_elements) in wanted.items()}
    assert all(found[name] >= num_entries for name, (num_entries, _) in wanted.items())
    densest = max(wanted, key=lambda name: wanted[name][0] / wanted[name][1])
    assert found[densest] == wanted[densest][0]


def save_native(folder: Path, config: AdapterConfig, deltas: Deltas, **changes: Any) -> Adapter:
    dense = {name: torch.randn(shape) for name, shape in changes.get("dense_shapes", {}).items()}
    save_adapter(folder, as_items(deltas), config=config.model_copy(update=changes), dense=dense)
    return load_adapter(folder)


def assert_same(found: Adapter, expected: Adapter) -> None:
    assert found.config == AdapterConfig(
        **{name: getattr(expected.config, name) for name in AdapterConfig.model_fields}
    )
    for (name, ours), (expected_name, theirs) in zip(found.items(), expected.items(), strict=True):
        assert name == expected_name
        for one, other in zip(ours, theirs, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other), name
    for name in expected.config.dense_shapes:
        assert torch.equal(found.read_dense(name), expected.read_dense(name))
    assert found.index_hash == expected.index_hash


def test_the_files(tmp_path: Path, adapter_config: AdapterConfig, deltas: Deltas) -> None:
    deltas[DOWN_PROJ] = tuple(part[:50] for part in deltas[DOWN_PROJ])  # another density than the other matrix
    report = save_supertuning(save_native(tmp_path / "native", adapter_config, deltas), tmp_path / "peft")
    assert sorted(os.listdir(tmp_path / "peft")) == ["README.md", CONFIG, WEIGHTS, RECORD_FILE]
    config = json.loads((tmp_path / "peft" / CONFIG).read_text())
    assert config["peft_type"] == "SUPERTUNING" and config["task_type"] == "CAUSAL_LM" and config["r"] is None
    assert config["base_model_name_or_path"] == "owner/tiny" and config["inference_mode"] is True
    assert config["target_modules"] == [Q_PROJ, DOWN_PROJ] and config["modules_to_save"] is None
    tensors = load_file(tmp_path / "peft" / WEIGHTS)
    assert {name: (tensor.dtype, tensor.numel()) for name, tensor in tensors.items()} == {
        f"{PREFIX}{Q_PROJ}.supertuning_indices": (torch.int32, 57),
        f"{PREFIX}{Q_PROJ}.supertuning_values": (torch.float32, 57),
        f"{PREFIX}{DOWN_PROJ}.supertuning_indices": (torch.int32, 95),
        f"{PREFIX}{DOWN_PROJ}.supertuning_values": (torch.float32, 95),
    }
    assert not tensors[f"{PREFIX}{DOWN_PROJ}.supertuning_indices"][50:].any()
    assert not tensors[f"{PREFIX}{DOWN_PROJ}.supertuning_values"][50:].any()
    assert (report.num_deltas, report.num_padding, report.warnings) == (107, 45, ())
    assert report.size_bytes == sum(path.stat().st_size for path in (tmp_path / "peft").iterdir())
    card = (tmp_path / "peft" / "README.md").read_text()
    assert "base_model: owner/tiny" in card and "trained weights: 107 of 1,536 in 2 matrices" in card


@pytest.mark.parametrize("case", ["even", "padded", "empty matrix", "nothing", "every weight", "classifier"])
def test_what_was_exported_comes_back(tmp_path: Path, adapter_config: AdapterConfig, deltas: Deltas, case: str) -> None:
    changes: dict[str, Any] = {"birth_steps": {0: 100, 25: 53}}
    index_zero = torch.tensor([0], dtype=torch.int32), torch.tensor([0.0])  # active, and not changed yet
    if case == "padded":
        deltas[Q_PROJ] = index_zero
    elif case == "empty matrix":
        deltas[Q_PROJ] = tuple(part[:0] for part in deltas[Q_PROJ])
    elif case == "nothing":
        deltas = {name: (indices[:0], values[:0]) for name, (indices, values) in deltas.items()}
    elif case == "every weight":
        deltas[Q_PROJ] = torch.arange(576, dtype=torch.int32), torch.randn(576)
    elif case == "classifier":
        changes |= {"task": "sequence_classification", "labels": ("no", "yes"), "pad_token_id": 2}
        changes["dense_shapes"] = {"score.weight": (2, 24)}
    native = save_native(tmp_path / "native", adapter_config, deltas, **changes)
    save_supertuning(native, tmp_path / "peft")
    assert_same(SupertuningAdapter(tmp_path / "peft"), native)


def test_another_name_of_the_base_and_an_older_export(
    tmp_path: Path, adapter_config: AdapterConfig, deltas: Deltas
) -> None:
    base = adapter_config.base.model_copy(update={"revision": "abc"})
    native = save_native(tmp_path / "native", adapter_config, deltas, base=base)
    save_supertuning(native, tmp_path / "peft")
    assert json.loads((tmp_path / "peft" / CONFIG).read_text())["revision"] == "abc"
    with pytest.raises(UserError, match="already exists and is not empty"):
        save_supertuning(native, tmp_path / "peft")
    save_supertuning(native, tmp_path / "peft", base_name="owner/copy", overwrite=True)
    config = json.loads((tmp_path / "peft" / CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/copy", None)
    assert_same(SupertuningAdapter(tmp_path / "peft"), native)
    for output in (tmp_path / "native", tmp_path):
        with pytest.raises(UserError, match=r"which is being read\. Give another path"):
            save_supertuning(native, output, overwrite=True)


@pytest.mark.parametrize(("name", "shape"), [("model.norm", (24, 1)), (f"{Q_PROJ}.bias", (24, 1))])
def test_biases_and_norms_are_refused(
    tmp_path: Path, adapter_config: AdapterConfig, name: str, shape: tuple[int, int]
) -> None:
    native = save_native(
        tmp_path / "native", adapter_config, {name: (torch.tensor([1]), torch.ones(1))}, shapes={name: shape}
    )
    with pytest.raises(UserError, match=rf"deltas of '{name}' .* Export it as a merged model or as a native adapter"):
        save_supertuning(native, tmp_path / "peft")
    assert os.listdir(tmp_path) == ["native"]


def test_a_matrix_of_2_to_the_31_weights_is_refused(tmp_path: Path, adapter_config: AdapterConfig) -> None:
    large = {"head": (torch.tensor([2**31 - 1]), torch.ones(1))}
    native = save_native(tmp_path / "native", adapter_config, large, shapes={"head": (2**16, 2**15)})
    with pytest.raises(UserError, match=r"'head' has 65536 x 32768 weights; .* ends at 2\^31. Export it as a merged"):
        save_supertuning(native, tmp_path / "peft")


def test_a_4_bit_base_is_warned_of(tmp_path: Path, make_adapter: MakeAdapter, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sparse_ds"):
        report = save_supertuning(load_adapter(make_adapter(quantization="nf4")), tmp_path / "peft")
    (warning,) = report.warnings
    assert "Export as shira" in warning and warning in caplog.text
    assert warning in (tmp_path / "peft" / "README.md").read_text()


def test_a_file_that_cannot_grow_leaves_nothing(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    native = load_adapter(make_adapter())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(RuntimeError, match=r"Could not write the adapter to .*Nothing was left there"):
            save_supertuning(native, tmp_path / "peft")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["adapter"]


def test_invalid_deltas_leave_nothing(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    """Of an adapter that does not check itself."""
    native = load_adapter(make_adapter())
    tensors = load_file(native.folder / WEIGHTS)
    tensors[f"{Q_PROJ}.values"][3] = math.nan
    save_file(tensors, native.folder / WEIGHTS)
    with pytest.raises(UserError, match=rf"tensor '{Q_PROJ}\.values' holds 1 numbers that are NaN or infinite"):
        save_supertuning(native, tmp_path / "peft")
    assert os.listdir(tmp_path) == ["adapter"]


def train_with_peft(base: Path, folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> PeftModel:
    """Three steps, so that the values are no zeros."""
    is_classifier = config.get("task_type") == "SEQ_CLS"
    model_class = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    arguments = {"num_labels": 3, "pad_token_id": 2} if is_classifier else {}
    model = model_class.from_pretrained(base, dtype=dtype, **arguments)
    config = {"sparsity": 0.9, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **config}
    tuned: PeftModel = get_peft_model(model, SupertuningConfig(**config))
    optimizer = torch.optim.SGD([one for one in tuned.parameters() if one.requires_grad], lr=1.0)
    for _ in range(3):
        output = tuned(TOKENS, labels=torch.tensor([0, 2]) if is_classifier else TOKENS)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    tuned.save_pretrained(folder)
    return tuned


def assert_deltas_of(adapter: Adapter, tuned: PeftModel) -> None:
    layers = {name: one for name, one in tuned.named_modules() if hasattr(one, "supertuning_values")}
    assert {name.removeprefix(PREFIX) for name in layers} == adapter.config.shapes.keys()
    for name, (indices, values) in adapter.items():
        expected = layers[f"{PREFIX}{name}"].get_delta_weight("default").detach().float()
        dense = torch.zeros(adapter.config.shapes[name]).view(-1)
        dense[indices.long()] = values
        assert torch.equal(dense.view_as(expected), expected) and bool(values.any()), name


def test_an_adapter_that_peft_trained(make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base()
    tuned = train_with_peft(base, tmp_path / "peft")
    stored = load_file(tmp_path / "peft" / WEIGHTS)[f"{PREFIX}{Q_PROJ}.supertuning_indices"]
    assert not torch.equal(stored, stored.sort().values)  # as PEFT has them
    adapter = SupertuningAdapter(tmp_path / "peft")
    assert_deltas_of(adapter, tuned)
    config = adapter.config
    assert (config.method, config.density) == ("supertuning", (57 + 95) / (576 + 960))
    assert (config.base.name, config.base.dtype, config.base.quantization) == (str(base), "float32", "none")
    merge_adapter(base, adapter, tmp_path / "merged", dtype="float32")
    expected = tuned.merge_and_unload().state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    save_supertuning(adapter, tmp_path / "again")
    assert_same(SupertuningAdapter(tmp_path / "again"), adapter)


def test_a_base_that_has_moved(make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base()
    tuned = train_with_peft(base, tmp_path / "peft")
    base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"its base model '.*llama_base' cannot be read: .* Give the base that it was"):
        SupertuningAdapter(tmp_path / "peft")
    assert_deltas_of(SupertuningAdapter(tmp_path / "peft", tmp_path / "moved"), tuned)
    for name, base_name in (("smaller", None), ("other", str(base))):
        config = json.loads((tmp_path / "peft" / CONFIG).read_text())
        (tmp_path / "peft" / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": base_name}))
        other = make_base(num_hidden_layers=1) if name == "smaller" else make_base(hidden_size=16)
        expected = r"has no tensor 'model\.layers\.1\..*'" if name == "smaller" else r"holds .*, expected 0 to"
        with pytest.raises(UserError, match=expected):
            SupertuningAdapter(tmp_path / "peft", other)
    (tmp_path / "peft" / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(UserError, match="names no base model"):
        SupertuningAdapter(tmp_path / "peft")


def test_a_classifier_that_peft_trained(make_base: MakeBase, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = make_base()
    tuned = train_with_peft(base, tmp_path / "peft", task_type="SEQ_CLS")
    with caplog.at_level(logging.WARNING, "sparse_ds"):
        adapter = SupertuningAdapter(tmp_path / "peft")
    assert "has no pad_token_id" in caplog.text
    assert adapter.config.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert adapter.config.dense_shapes == {"score.weight": (3, 24)}
    merge_adapter(base, adapter, tmp_path / "merged", dtype="float32")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(merged(TOKENS).logits, tuned(TOKENS).logits)


def test_indices_that_peft_left_out(make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base()
    for select_top in (True, False):
        folder = tmp_path / f"peft_{select_top}"
        tuned = train_with_peft(base, folder, save_precomputed_indices=False, select_top=select_top)
        assert not any("indices" in name for name in load_file(folder / WEIGHTS))
        assert_deltas_of(SupertuningAdapter(folder), tuned)
    # In bf16 many weights have the same magnitude, and which of them comes first is up to the machine.
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    train_with_peft(tmp_path / "bf16", tmp_path / "peft", torch.bfloat16, save_precomputed_indices=False)
    with pytest.raises(UserError, match=r"holds no indices .* have equal magnitudes in base .* Merge it with PEFT"):
        SupertuningAdapter(tmp_path / "peft")


def test_other_forms_of_the_same(make_base: MakeBase, tmp_path: Path) -> None:
    """A `.bin` file, int64 indices, 16-bit values, no prefix, and entries that only fill up."""
    base = make_base()
    tuned = train_with_peft(base, tmp_path / "peft")
    expected = SupertuningAdapter(tmp_path / "peft")
    assert expected.config.base.dtype == "float32"
    tensors = load_file(tmp_path / "peft" / WEIGHTS)
    for name, tensor in tensors.items():
        padded = torch.cat([torch.zeros(2, dtype=tensor.dtype), tensor, torch.zeros(1, dtype=tensor.dtype)])
        tensors[name] = padded.long() if "indices" in name else padded
    torch.save({name.removeprefix(PREFIX): one for name, one in tensors.items()}, tmp_path / "peft/adapter_model.bin")
    (tmp_path / "peft" / WEIGHTS).unlink()
    assert_deltas_of(SupertuningAdapter(tmp_path / "peft"), tuned)
    rounded = {name: tensor if "indices" in name else tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(rounded, tmp_path / "peft" / WEIGHTS)
    for name, (_, values) in SupertuningAdapter(tmp_path / "peft").items():
        assert torch.equal(values, expected.read(name).values.bfloat16().float())


Tensors = dict[str, torch.Tensor]


def _set(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        name = f"{PREFIX}{Q_PROJ}.supertuning_{part}"
        tensors[name] = change(tensors[name].clone()).contiguous()

    return apply


def _put(position: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def put(tensor: torch.Tensor) -> torch.Tensor:
        tensor[position] = value
        return tensor

    return put


DAMAGES = {
    "too large": (_set("indices", _put(3, 576)), r"supertuning_indices' holds 576, expected 0 to 575"),
    "negative": (_set("indices", _put(3, -1)), r"supertuning_indices' holds -1, expected 0 to 575"),
    "twice": (_set("indices", lambda one: torch.cat([one[:-1], one[:1]])), r"more than one value for"),
    "float indices": (_set("indices", torch.Tensor.float), r"is torch\.float32 \[57\], expected int32 or int64"),
    "double values": (_set("values", torch.Tensor.double), r"is torch\.float64 \[57\], expected float32 or bfloat16"),
    "two dimensions": (_set("values", lambda one: one[None]), r"is torch\.float32 \[1, 57\].* and 1 dimension"),
    "shorter": (_set("values", lambda one: one[:-1]), r"supertuning_values' has 56 entries, its indices 57"),
    "nan": (_set("values", _put(5, math.nan)), r"supertuning_values' holds 1 numbers that are NaN or infinite"),
    "infinite": (_set("values", _put(5, math.inf)), r"supertuning_values' holds 1 numbers that are NaN or infinite"),
    "no values": (
        lambda tensors: tensors.pop(f"{PREFIX}{Q_PROJ}.supertuning_values"),
        r"q_proj\.supertuning_values' is missing",
    ),
    "another tensor": (
        lambda tensors: tensors.update({f"{PREFIX}{Q_PROJ}.lora_A.weight": torch.ones(2, 24)}),
        r"q_proj\.lora_A\.weight' is neither an index nor a value of a SUPERTUNING adapter",
    ),
}


@pytest.mark.parametrize("ours", [False, True], ids=["of PEFT", "of this project"])
def test_damages(make_base: MakeBase, make_adapter: MakeAdapter, tmp_path: Path, ours: bool) -> None:
    folder = tmp_path / "peft"
    if ours:
        save_supertuning(load_adapter(make_adapter()), folder)
    else:
        train_with_peft(make_base(), folder)
    good = load_file(folder / WEIGHTS)
    for what, (damage, message) in DAMAGES.items():
        tensors = dict(good)
        damage(tensors)
        save_file(tensors, folder / WEIGHTS)
        with pytest.raises(UserError, match=rf"Adapter file '{folder / WEIGHTS}': tensor '.*{message}"):
            SupertuningAdapter(folder)
            pytest.fail(what)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-10])
    with pytest.raises(UserError, match=rf"Adapter file '{folder / WEIGHTS}' is damaged"):
        SupertuningAdapter(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"has no 'adapter_model\.safetensors'"):
        SupertuningAdapter(folder)


def test_files_that_do_not_belong_together(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    folder = tmp_path / "peft"
    save_supertuning(load_adapter(make_adapter()), folder)
    tensors = load_file(folder / WEIGHTS)
    indices = tensors[f"{PREFIX}{Q_PROJ}.supertuning_indices"]
    unused = min(set(range(576)) - set(indices.tolist()))
    indices[-1] = unused
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(UserError, match=rf"does not belong to its '{RECORD_FILE}': the indices have the hash"):
        SupertuningAdapter(folder)
    record = json.loads((folder / RECORD_FILE).read_text())
    for change, message in (
        ({"num_active": {**record["num_active"], Q_PROJ: 40}}, rf"other entries than the 40 of '{RECORD_FILE}'"),
        ({"num_active": {**record["num_active"], Q_PROJ: 60}}, rf"other entries than the 60 of '{RECORD_FILE}'"),
        ({"num_active": {Q_PROJ: 57}}, r"with all modules"),
        ({"format_version": 2}, r"has format 'sparse_ds\.peft_export' 2, expected 'sparse_ds\.peft_export' 1"),
        ({"config": {}}, r"is not what an export wrote: config\.method: Field required"),
    ):
        (folder / RECORD_FILE).write_text(json.dumps({**record, **change}))
        with pytest.raises(UserError, match=message):
            SupertuningAdapter(folder)


def test_low_rank_parts_are_refused(make_base: MakeBase, tmp_path: Path) -> None:
    train_with_peft(make_base(), tmp_path / "peft", r=2)
    with pytest.raises(UserError, match=r"has low-rank parts beside the sparse ones \(r is 2\)"):
        SupertuningAdapter(tmp_path / "peft")
