"""Multi-head models in plain transformers: every task's logits are those of the merged body with its head alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_items import MakeBase
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from sparse_ds.adapter.adapter import AdapterBase, AdapterConfig
from sparse_ds.adapter.combining import Combination
from sparse_ds.adapter.native import NativeAdapter, load_adapter, save_adapter
from sparse_ds.config.errors import UserError
from sparse_ds.export.merged import merge_adapter
from sparse_ds.export.multi_head import task_logits, write_multi_head

Q_PROJ, DOWN_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
SHAPES = {Q_PROJ: (24, 24), DOWN_PROJ: (24, 40)}
LABELS = {"mood": ("sad", "happy"), "topic": ("a", "b", "c"), "spam": ("no", "yes")}
Make = Callable[..., NativeAdapter]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(name of the labels, ...) -> a saved classifier adapter over the tiny base, opened.

    Values are eighths, so that their sums are exact.
    """
    made: list[Path] = []

    def make_one(of: str, *, quantization: str = "none", dtype: str = "float32", **changes: Any) -> NativeAdapter:
        folder = tmp_path / f"adapter_{len(made)}"
        made.append(folder)
        generator = torch.Generator().manual_seed(len(made))
        labels = LABELS[of]
        base = AdapterBase.model_validate({"name": "owner/tiny", "quantization": quantization, "dtype": dtype})
        fields: dict[str, Any] = {
            "method": "sparta",
            "density": 0.3,
            "base": base,
            "shapes": SHAPES,
            "dense_shapes": {"score.weight": (len(labels), 24)},
            "task": "sequence_classification",
            "labels": labels,
            "pad_token_id": 2,
        }
        items = []
        for name, (rows, cols) in SHAPES.items():
            num_active = rows * cols * 3 // 10
            indices = torch.randperm(rows * cols, generator=generator)[:num_active].sort().values
            items.append((name, indices, torch.randint(-4, 5, (num_active,), generator=generator) / 8))
        config = AdapterConfig.model_validate({**fields, **changes})
        dense = {name: torch.randn(shape, generator=generator) for name, shape in config.dense_shapes.items()}
        save_adapter(folder, items, config=config, dense=dense)
        return load_adapter(folder)

    return make_one


def summed_body(base: Path, adapters: dict[str, NativeAdapter]) -> Any:
    """The oracle: the base in plain transformers, the deltas of all adapters added to its weights."""
    body = AutoModel.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        for name in SHAPES:
            weight = body.get_submodule(name.removeprefix("model.")).weight
            added = torch.zeros(weight.numel())
            for adapter in adapters.values():
                indices, values = adapter.read(name)
                added.index_add_(0, indices.long(), values)
            weight += added.view_as(weight)
    return body


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_each_task_has_its_logits(make: Make, make_base: MakeBase, tmp_path: Path, architecture: str) -> None:
    base, adapters = make_base(architecture, tied=True), {task: make(task) for task in LABELS}
    report = write_multi_head(adapters, tmp_path / "model", base=base, dtype="float32")
    assert report.checkpoint.folder == tmp_path / "model"
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    assert type(model).__name__ == model.config.architectures[0]
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("a b")["input_ids"] == [1, 2]
    tokens = torch.tensor([[1, 5, 3, 2, 2], [1, 7, 9, 4, 6], [1, 8, 2, 2, 2]])  # pad token 2
    with torch.no_grad():
        by_task = task_logits(model(tokens).logits, model.config)
        hidden = summed_body(base, adapters)(tokens).last_hidden_state
    last = torch.tensor([2, 4, 1])
    assert list(by_task) == list(LABELS)
    for task, adapter in adapters.items():
        expected = hidden[torch.arange(3), last] @ adapter.read_dense("score.weight").T
        # Products of fp32 in another order.
        assert by_task[task].shape == (3, len(LABELS[task]))
        assert torch.allclose(by_task[task], expected, rtol=1e-5, atol=1e-5), task
        # The same body with this head alone, as a model of its own.
        changes = {"dense_shapes": adapter.config.dense_shapes, "labels": adapter.config.labels, "pad_token_id": 2}
        single = write_alone(tmp_path / task, base, adapters, adapter, changes)
        with torch.no_grad():
            assert torch.allclose(single(tokens).logits, by_task[task], rtol=1e-5, atol=1e-5), task


def write_alone(folder: Path, base: Path, adapters: dict[str, NativeAdapter], head: NativeAdapter, changes: Any) -> Any:
    """The summed body with one head, through the writer for one adapter."""
    items = []
    for name, (rows, cols) in SHAPES.items():
        added = torch.zeros(rows * cols)
        for adapter in adapters.values():
            indices, values = adapter.read(name)
            added.index_add_(0, indices.long(), values)
        items.append((name, added.nonzero().flatten(), added[added != 0]))
    config = head.config.model_copy(update=changes)
    dense = {"score.weight": head.read_dense("score.weight")}
    save_adapter(folder / "adapter", items, config=config, dense=dense)
    merge_adapter(base, folder / "adapter", folder / "model", dtype="float32")
    return AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()


def test_config_and_card_say_whose_rows_are_whose(make: Make, make_base: MakeBase, tmp_path: Path) -> None:
    adapters = {task: make(task) for task in ("topic", "spam")}
    write_multi_head(adapters, tmp_path / "model", base=make_base(), dtype="float32")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["sparse_ds_heads"] == {"topic": [0, 3], "spam": [3, 5]}
    assert config["id2label"] == dict(
        zip("01234", ("topic/a", "topic/b", "topic/c", "spam/no", "spam/yes"), strict=True)
    )
    head = load_file(tmp_path / "model" / "model.safetensors")["score.weight"]
    assert torch.equal(head, torch.cat([adapter.read_dense("score.weight") for adapter in adapters.values()]))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert model.config.id2label[3] == "spam/no" and model.config.pad_token_id == 2
    readme = (tmp_path / "model" / "README.md").read_text()
    assert "| topic | 0 to 2 |" in readme and "| spam | 3 to 4 |" in readme and "multi_head_merge_sum" in readme
    # The lines of the card, as they stand there.
    code = readme.split("## Heads")[1].split("```python\n")[1].split("```")[0]
    scope: dict[str, Any] = {"model": model.eval(), "inputs": {"input_ids": torch.tensor([[1, 3, 4]])}}
    with torch.no_grad():
        exec(code, scope)
    expected = task_logits(scope["logits"], config)
    assert {task: rows.tolist() for task, rows in scope["by_task"].items()} == {
        task: rows.tolist() for task, rows in expected.items()
    }
    # What plain transformers saves again is still a multi-head model.
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again").config
    assert task_logits(torch.zeros(2, 5), again)["spam"].shape == (2, 2)


def test_any_combination_over_nf4(make: Make, make_base: MakeBase, tmp_path: Path) -> None:
    """Body by TIES, over dequantized weights in bf16."""
    adapters = {task: make(task, quantization="nf4", dtype="bfloat16") for task in ("mood", "topic")}
    combination = Combination("ties", density=0.5)
    base = make_base()
    report = write_multi_head(adapters, tmp_path / "ties", base=base, combination=combination)
    summed = write_multi_head(adapters, tmp_path / "sum", base=base)
    assert 0 < report.num_deltas < summed.num_deltas
    ties, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("ties", "sum"))
    assert {name for name in plain if not torch.equal(plain[name], ties[name])} == {f"{name}.weight" for name in SHAPES}
    assert plain["score.weight"].dtype == torch.bfloat16


def test_output_is_whole_or_not_there(make: Make, make_base: MakeBase, tmp_path: Path) -> None:
    base, adapters = make_base(), {"mood": make("mood"), "spam": make("spam")}
    write_multi_head(adapters, tmp_path / "model", base=base)
    with pytest.raises(UserError, match="already exists and is not empty"):
        write_multi_head(adapters, tmp_path / "model", base=base)
    before = (tmp_path / "model" / "config.json").read_bytes()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / name).unlink()
    names = sorted(os.listdir(tmp_path))
    for folder, overwrite in (("new", False), ("model", True)):
        with pytest.raises(UserError, match="holds no tokenizer"):
            write_multi_head(adapters, tmp_path / folder, base=base, overwrite=overwrite)
    assert sorted(os.listdir(tmp_path)) == names
    assert (tmp_path / "model" / "config.json").read_bytes() == before
    tokenizer = tmp_path / "model"
    write_multi_head(dict(reversed(adapters.items())), tmp_path / "new", base=base, tokenizer=tokenizer)
    assert json.loads((tmp_path / "new" / "config.json").read_text())["sparse_ds_heads"] == {
        "spam": [0, 2],
        "mood": [2, 4],
    }
    write_multi_head({"spam": adapters["spam"]}, tmp_path / "new", base=base, tokenizer=tokenizer, overwrite=True)
    assert json.loads((tmp_path / "new" / "config.json").read_text())["sparse_ds_heads"] == {"spam": [0, 2]}
    for source in (adapters["spam"].folder, tmp_path, base):
        with pytest.raises(UserError, match="which is being read"):
            write_multi_head(adapters, source, base=base, overwrite=True)


def test_what_cannot_share_a_body(make: Make, make_base: MakeBase, tmp_path: Path) -> None:
    base, mood = make_base(), make("mood")
    headless = {"task": "causal_lm", "labels": None, "pad_token_id": None, "dense_shapes": {}}
    two_tensors = {"dense_shapes": {"score.weight": (2, 24), "model.embed_tokens.weight": (40, 24)}}
    for adapters, message in [
        ({}, "No adapter was given for a multi-head model"),
        ({"a/b": mood}, "task is named 'a/b'; expected a name without '/'"),
        ({"": mood}, "task is named ''"),
        ({"mood": mood, "text": make("spam", **headless)}, r"of task 'text' is of 'causal_lm', which has no head"),
        ({"mood": mood, "spam": make("spam", pad_token_id=0)}, "different pad tokens .2 of 'mood', 0 of 'spam'"),
        ({"mood": mood, "spam": make("spam", **two_tensors)}, r"task 'spam' trained .* as a whole, expected"),
        ({"mood": mood, "spam": make("spam", dtype="bfloat16")}, r"base\.dtype is float32 of the first and bfloat16"),
    ]:
        with pytest.raises(UserError, match=message):
            write_multi_head(adapters, tmp_path / "model", base=base)
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob(".*"))
    with pytest.raises(UserError, match="no 'sparse_ds_heads'"):
        task_logits(torch.zeros(1, 2), {"id2label": {}})
    with pytest.raises(UserError, match="The logits have 2 columns, expected 4"):
        task_logits(torch.zeros(1, 2), {"sparse_ds_heads": {"a": [0, 2], "b": [2, 4]}})
