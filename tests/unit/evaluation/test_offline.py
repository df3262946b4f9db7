"""`sparse-ds eval`: models and adapters that lie on the disk, and what is said of those that do not."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_items import as_items
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

from sparse_ds import cli
from sparse_ds.adapter.adapter import AdapterBase, AdapterConfig
from sparse_ds.adapter.native import save_adapter
from sparse_ds.embedded import resolve_model
from sparse_ds.evaluation.offline import evaluate_saved

MODULE = "model.layers.0.self_attn.q_proj"
ROWS = [
    {"context": "The opposite of sour is", "continuation": "sweet."},
    {"context": "Leo has a brown", "continuation": "plate. Mia is in the shop."},
]


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a command does to logging and to the environment ends with the test."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    ours = logging.getLogger("sparse_ds")
    before = ours.handlers, ours.propagate, ours.level
    yield
    ours.handlers, ours.propagate, ours.level = before


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return str(path)


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any) -> float:
    """Of the continuations, from the loss that transformers itself computes."""
    total = count = 0.0
    for row in ROWS:
        ids = tokenizer(f"{row['context']} {row['continuation']}", return_tensors="pt")["input_ids"]
        num_scored = ids.shape[1] - len(tokenizer(row["context"])["input_ids"])
        labels = ids.clone()
        labels[:, :-num_scored] = -100
        total += float(model(input_ids=ids, labels=labels).loss) * num_scored
        count += num_scored
    return float(torch.tensor(total / count).exp())


def score(model: str | Path, rows: str, **settings: Any) -> float:
    (record,) = evaluate_saved(str(model), [rows], dtype="float32", **settings).record["tasks"]
    return float(record["perplexity"])


def fresh_base() -> Any:
    return AutoModelForCausalLM.from_pretrained(resolve_model("embedded"), dtype="float32").eval()


def test_a_model_and_an_adapter_over_it(tmp_path: Path, rows: str, embedded: tuple[Any, Any]) -> None:
    model, tokenizer = embedded
    before = perplexity(model, tokenizer)
    assert score("embedded", rows) == pytest.approx(before, rel=1e-5)

    changed = fresh_base()
    weight_OI = changed.get_submodule(MODULE).weight
    indices = torch.arange(0, weight_OI.numel(), 7, dtype=torch.int32)
    values = torch.randn(len(indices), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        weight_OI.view(-1)[indices.long()] += values
    config = AdapterConfig(
        method="sparta",
        density=0.2,
        base=AdapterBase(name="embedded", quantization="none", dtype="float32"),
        shapes={MODULE: tuple(weight_OI.shape)},
    )
    run = tmp_path / "run"
    save_adapter(run / "adapter", as_items({MODULE: (indices, values)}), config=config)
    after = perplexity(changed, tokenizer)
    assert after != pytest.approx(before, rel=0.01)
    assert score(run / "adapter", rows) == pytest.approx(after, rel=1e-5)
    # The folder of the run means what it left; another folder of the same base will do.
    (run / "resolved_config.json").write_text("{}", encoding="utf-8")
    copy = tmp_path / "copy"
    shutil.copytree(resolve_model("embedded"), copy)
    assert score(run, rows, base=str(copy)) == pytest.approx(after, rel=1e-5)
    changed.save_pretrained(run / "merged")
    tokenizer.save_pretrained(run / "merged")
    assert score(run, rows) == pytest.approx(after, rel=1e-5)


def test_an_adapter_of_peft(tmp_path: Path, rows: str, embedded: tuple[Any, Any]) -> None:
    base = fresh_base()
    base.config._name_or_path = str(resolve_model("embedded"))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.peft_config["default"].base_model_name_or_path = str(resolve_model("embedded"))
    model.save_pretrained(tmp_path / "lora")
    expected = perplexity(model.eval(), embedded[1])
    # Merged or beside the base: fp32 sums in another order.
    assert score(tmp_path / "lora", rows) == pytest.approx(expected, rel=1e-4)


def test_table_and_file(tmp_path: Path, rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "scores" / "all.json"
    inline = json.dumps({"source": rows, "name": "one", "num_samples": 5})
    arguments = ["eval", "embedded", "--tasks", rows, inline, "--limit", "1", "--output", str(output)]
    assert cli.main([*arguments, "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(number for number, line in enumerate(lines) if line.startswith("task "))
    assert [line.split()[:2] for line in lines[header + 2 :]] == [
        [task, metric] for task in ("words", "one") for metric in ("accuracy", "perplexity", "perplexity_per_row")
    ]
    record = json.loads(output.read_text(encoding="utf-8"))
    assert [task["num_samples"] for task in record["tasks"]] == [1, 1]
    # The standard error of one row is none.
    assert record["tasks"][0]["accuracy_stderr"] is None


@pytest.fixture
def no_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if lm_eval were not installed: None makes an import fail."""
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)


@pytest.mark.usefixtures("no_harness")
def test_without_the_harness(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "embedded", "--tasks", "piqa", "--device", "cpu"]) == cli.USER_ERROR_EXIT_CODE
    error = capsys.readouterr().err
    assert "error: task piqa: no data file, so it is a task of lm-evaluation-harness, which is not installed" in error
    assert "pip install 'lm_eval>=0.4.13,<0.5'" in error


def save_classifier(folder: Path) -> None:
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    LlamaForSequenceClassification(LlamaConfig(**sizes, num_hidden_layers=1, pad_token_id=0)).save_pretrained(folder)


def save_half(folder: Path) -> None:
    """A causal language model without its last tensor."""
    model = fresh_base()
    state = model.state_dict()
    state.pop("model.norm.weight")
    model.save_pretrained(folder, state_dict=state)
    shutil.copy(Path(resolve_model("embedded")) / "tokenizer.json", folder)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (None, "which is no folder (looked in"),
        (Path.mkdir, "is no model ("),
        (save_classifier, "is a LlamaForSequenceClassification; expected a causal language model"),
        (save_half, "has no tensor model.norm.weight (1 are missing)"),
        (lambda folder: (folder.mkdir(), (folder / "adapter_config.json").write_text("{")), "cannot be read:"),
        (
            lambda folder: (folder.mkdir(), (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')),
            "cannot be loaded by peft",
        ),
        (
            lambda folder: (folder.mkdir(), (folder / "resolved_config.json").write_text("{}")),
            "is a run that has left neither merged/ nor adapter/",
        ),
    ],
)
def test_no_model_that_answers(
    tmp_path: Path, rows: str, capsys: pytest.CaptureFixture[str], make: Any, expected: str
) -> None:
    folder = tmp_path / "given"
    if make is not None:
        make(folder)
    assert cli.main(["eval", str(folder), "--tasks", rows, "--device", "cpu"]) == cli.USER_ERROR_EXIT_CODE
    error = capsys.readouterr().err
    assert error.startswith("error: ") and expected in error


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--batch-size", "0"], "--batch-size: got 0"),
        (["--limit", "0"], "--limit: got 0"),
        (["--num-fewshot", "2"], "--num-fewshot: only tasks of lm-evaluation-harness use it"),
        (["--data-folder", "x"], "--data-folder: only tasks of lm-evaluation-harness use it"),
        (["--base", "embedded"], "--base: given, but embedded is no adapter of this project"),
        (["--output", "/proc/no/scores.json"], "--output: /proc/no/scores.json cannot be written"),
        (["--tasks", "nothing.jsonl"], "--tasks: no such file: nothing.jsonl"),
        (["--tasks", '{"source": 3}'], '--tasks: {"source": 3}: source: Input should be a valid string. The fields'),
        (["--tasks", '{"source"'], '--tasks: {"source" is no JSON'),
    ],
)
def test_mistakes(rows: str, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    given = ["eval", "embedded", "--device", "cpu", "--tasks", rows, *arguments]
    assert cli.main(given) == cli.USER_ERROR_EXIT_CODE
    assert expected in capsys.readouterr().err
