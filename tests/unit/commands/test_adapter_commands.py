"""`sparse-ds export` to PEFT, `import`, `merge` and `inspect`, as typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapter_items import Deltas, MakeAdapter, MakeBase, as_items
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sparse_ds.adapter.adapter import AdapterConfig
from sparse_ds.adapter.native import load_adapter, save_adapter
from sparse_ds.cli import main
from sparse_ds.export.multi_head import task_logits

FILES = ("adapter_config.json", "adapter_model.safetensors")


def run(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.mark.parametrize("peft_format", ["supertuning", "shira"])
def test_to_peft_and_back(
    make_base: MakeBase, make_adapter: MakeAdapter, tmp_path: Path, peft_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = make_base(), make_adapter(dtype="float32")
    assert run("export", adapter, tmp_path / "peft", "--format", peft_format, "--base-model", base) == 0
    assert "153 deltas" in capsys.readouterr().out
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "peft")
    assert run("import", tmp_path / "peft", tmp_path / "back") == 0
    for file in FILES:
        assert (tmp_path / "back" / file).read_bytes() == (adapter / file).read_bytes()


def test_the_difference_of_two_checkpoints(
    make_base: MakeBase, make_adapter: MakeAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = make_base(), make_adapter(dtype="float32")
    assert run("export", adapter, tmp_path / "tuned", "--base-model", base, "--dtype", "float32") == 0
    assert run("import", tmp_path / "tuned", tmp_path / "exact", "--base-model", base) == 0
    assert "153 weights differ, 153 kept" in capsys.readouterr().out
    assert load_adapter(tmp_path / "exact").index_hash == load_adapter(adapter).index_hash
    assert run("import", tmp_path / "tuned", tmp_path / "top", "--base-model", base, "--density", "0.05") == 0
    assert sum(deltas.values.numel() for _, deltas in load_adapter(tmp_path / "top").items()) == 28 + 48
    assert run("import", tmp_path / "tuned", tmp_path / "none") == 2
    assert "name the base that it was made from with --base-model" in capsys.readouterr().err
    assert run("import", adapter, tmp_path / "none", "--density", "0.05") == 2
    assert "--density is of dense checkpoints" in capsys.readouterr().err
    assert run("import", adapter, tmp_path / "none", "--revision", "main") == 2
    assert "--revision is of dense checkpoints" in capsys.readouterr().err


def test_merge_prints_the_overlap_and_writes_any_format(
    make_base: MakeBase, make_adapter: MakeAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, one = make_base(), make_adapter()
    assert run("export", one, tmp_path / "two", "--format", "native") == 0
    words = ["merge", one, tmp_path / "two", "--method", "linear", "--weights", "0.5", "1.5"]
    json_file = tmp_path / "overlap.json"
    assert run(*words, "--output", tmp_path / "both", "--format", "native", "--overlap-json", json_file) == 0
    assert "conflicts" in capsys.readouterr().out
    assert json.loads(json_file.read_text())["pairs"][0]["num_shared"] == 153
    for name, (indices, values) in load_adapter(tmp_path / "both").items():
        before = load_adapter(one).read(name)
        assert torch.equal(indices, before.indices)
        assert torch.allclose(values, 2 * before.values, rtol=1e-6)
    assert run(*words, "--output", tmp_path / "model", "--base-model", base) == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert run("merge", one, tmp_path / "two", "--method", "ties", "--output", tmp_path / "x") == 2
    assert "Merging by 'ties': it needs a density" in capsys.readouterr().err
    for source in (one, tmp_path / "two"):
        for written in ("merged", "native", "supertuning"):
            given = ["--output", source, "--base-model", base, "--format", written, "--overwrite"]
            assert run(*words, *given) == 2
            assert "which is being read" in capsys.readouterr().err


def test_one_model_for_two_tasks(
    make_base: MakeBase,
    adapter_config: AdapterConfig,
    deltas: Deltas,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = make_base()
    for task, labels in (("mood", ("sad", "glad")), ("topic", ("a", "b", "c"))):
        update = {"dense_shapes": {"score.weight": (len(labels), 24)}, "labels": labels, "pad_token_id": 0}
        config = adapter_config.model_copy(update={**update, "task": "sequence_classification"})
        head = {"score.weight": torch.randn(len(labels), 24)}
        save_adapter(tmp_path / task, as_items(deltas), config=config, dense=head)
    words = ["merge", tmp_path / "mood", tmp_path / "topic", "--output", tmp_path / "out", "--base-model", base]
    assert run(*words) == 2
    assert "Make a multi-head model" in capsys.readouterr().err
    assert run(*words, "--tasks", "mood", "mood") == 2
    assert "--tasks: got mood, mood; expected a name of its own" in capsys.readouterr().err
    assert run(*words, "--tasks", "mood", "topic", "--dtype", "float32", "--verify") == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    logits = task_logits(model(torch.tensor([[1, 2, 3]])).logits, model.config)
    assert {task: tuple(each.shape) for task, each in logits.items()} == {"mood": (1, 2), "topic": (1, 3)}


def test_inspect(make_adapter: MakeAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = make_adapter()
    assert run("inspect", adapter, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_active"] == 153 and found["indices_sha256"] == load_adapter(adapter).index_hash
    assert run("inspect", adapter) == 0
    assert "153 of 1,536" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert run("inspect", tmp_path / "empty") == 2
    assert "holds no adapter" in capsys.readouterr().err
