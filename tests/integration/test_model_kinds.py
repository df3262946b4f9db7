"""Every architecture from the command to plain transformers, on two ranks, computed in fp32.

The oracle is transformers: it loads the merged folder, tokenizes the held-out texts itself, and must find the held-out
loss and accuracy of the run. Held out are 31 rows, so that the last round of batches is not full.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from finished_runs import FinishedRun
from forks import train_in_forks
from safetensors.torch import load_file
from short_run import set_words
from tiny_models import save_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from sparse_ds.cli import USER_ERROR_EXIT_CODE

HINTS = {"bad": "angry", "fair": "plain", "good": "happy"}
LABELS = list(HINTS)
WORDS = [*HINTS.values(), *LABELS, "mood", ":", *(f"w{number}" for number in range(6))]
COMMON = [
    "model.name_or_path=base",
    "model.dtype=float32",
    "model.quantization=none",
    "data.train=train.jsonl",
    "data.eval=eval.jsonl",
    "method.density=0.2",
    "train.max_steps=30",
    "train.micro_batch_size=4",
    "train.global_batch_size=16",
    "train.output_dir=run",
    "train.cpu_threads=1",
    "train.eval_micro_batch_size=8",
    "export.merged_dtype=float32",
    "monitor.progress_bar=false",
    "monitor.sample_max_tokens=4",
]
CLASSIFIER = ["model.task=sequence_classification", "optimizer.learning_rate=0.02"]
SFT_MA = ["method.name=sft_ma", "method.interval_steps=5", "method.estimation_steps=2"]
SPARTA = ["method.name=sparta", "method.train_biases=true", "method.train_norms=true"]
CASES: dict[str, list[str]] = {
    "mistral": SFT_MA,
    "gemma2": ["method.name=sparta", "method.train_norms=true"],
    "bert": [*SFT_MA, "model.quantization=nf4"],
    "roberta": [*SPARTA, "train.gradient_checkpointing=true"],
}


def save_rows(path: Path, count: int, *, seed: int) -> None:
    """Pairs of texts; the label is that of the hint word, which is in one of them."""
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        label = generator.choice(LABELS)
        texts = [[f"w{generator.randrange(6)}" for _ in range(generator.randrange(1, 4))] for _ in range(2)]
        texts[generator.randrange(2)].append(HINTS[label])
        rows.append({"text": " ".join(texts[0]), "text_pair": " ".join(texts[1]), "label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train(folder: Path, config: str, settings: list[str], num_ranks: int = 2) -> FinishedRun:
    arguments = ["--config", config, *set_words([*COMMON, *settings])]
    ranks = train_in_forks([arguments] * num_ranks, [folder] * num_ranks)
    assert [rank.exit_code for rank in ranks] == [0] * num_ranks, ranks
    return FinishedRun.read(folder / "run")


def make_work(folder: Path, model_type: str) -> Path:
    folder.mkdir()
    save_model(model_type, folder / "base", WORDS)
    save_rows(folder / "train.jsonl", 200, seed=1)
    save_rows(folder / "eval.jsonl", 31, seed=2)
    return folder


@torch.no_grad()
def plain_logits(folder: Path, rows: list[dict[str, str]], *, pairs: bool, instruction: str = "{text}") -> Any:
    """[31, 3] of plain transformers, and the labels."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    first, second = [row["text"] for row in rows], [row["text_pair"] for row in rows]
    joined = [instruction.replace("{text}", f"{one}\n{other}") for one, other in zip(first, second, strict=True)]
    batch = (
        tokenizer(first, second, padding=True, return_tensors="pt")
        if pairs
        else tokenizer(joined, padding=True, return_tensors="pt", return_token_type_ids=False)
    )
    labels = torch.tensor([model.config.label2id[row["label"]] for row in rows])
    return model(**batch).logits, labels


def without(arguments: list[str], key: str) -> list[str]:
    """The command line without the setting of one key."""
    place = next(i for i, word in enumerate(arguments) if word.startswith(f"{key}="))
    return [*arguments[: place - 1], *arguments[place + 1 :]]


def changed_names(base: Path, run: FinishedRun) -> set[str]:
    """Tensors of the merged model that differ from the base's at other places than the adapter's indices."""
    merged = load_file(run.folder / "merged" / "model.safetensors")
    found = set()
    for name, tensor in load_file(base / "model.safetensors").items():
        renamed = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        renamed = renamed if renamed in merged else f"roberta.{renamed}"
        if renamed not in merged:
            continue
        same = merged[renamed].view(-1) == tensor.view(-1)
        module = renamed if renamed.endswith(".bias") else renamed.removesuffix(".weight")
        same[run.adapter.get(f"{module}.indices", torch.empty(0)).long()] = True
        if not bool(same.all()):
            found.add(renamed)
    return found


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=[pytest.mark.slow] if name == "mistral" else []) for name in CASES]
)
def test_plain_transformers_classifies_as_the_run_did(tmp_path: Path, model_type: str) -> None:
    work = make_work(tmp_path / "work", model_type)
    settings = CASES[model_type]
    config = "zero3_sft_ma" if "method.name=sft_ma" in settings else "zero3_full"
    run = train(work, config, [*CLASSIFIER, *settings])
    rows = [json.loads(line) for line in (work / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
    is_encoder = model_type in ("bert", "roberta")
    logits, labels = plain_logits(run.folder / "merged", rows, pairs=is_encoder)
    summary = run.summary
    assert summary["heldout_loss_after"] < summary["heldout_loss_before"] - 0.2
    assert float(F.cross_entropy(logits, labels)) == pytest.approx(summary["heldout_loss_after"], rel=0, abs=1e-5)
    scores = summary["heldout_scores_after"]
    assert float((logits.argmax(-1) == labels).float().mean()) == pytest.approx(scores["accuracy"])
    assert [record["num_samples"] for record in run.of_kind("eval")] == [31, 31]
    heads = {
        "bert": ["bert.pooler.dense", "classifier"],
        "roberta": ["classifier.dense", "classifier.out_proj"],
    }.get(model_type)
    dense = {f"{name}.{part}" for name in heads for part in ("weight", "bias")} if heads else {"score.weight"}
    stored = json.loads((run.folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert stored["dense_shapes"].keys() == dense
    sparse = {name.removesuffix(".values") for name in run.adapter if name.endswith(".values")}
    dequantized = {f"{name}.weight" for name in sparse} if "model.quantization=nf4" in settings else set()
    assert changed_names(work / "base", run) == {name for name in dense if name.startswith("bert.")} | dequantized
    num_linears = 12 if is_encoder else 14
    num_norms = {"gemma2": 9, "roberta": 4}.get(model_type, 0)
    num_biases = 12 if model_type == "roberta" else 0
    assert len(sparse) == num_linears + num_norms + num_biases
    assert all(bool(run.adapter[f"{name}.values"].any()) for name in sparse if not name.endswith("key.bias"))


@pytest.mark.parametrize("precision", [pytest.param("float32", marks=pytest.mark.slow), "nf4"])
def test_gemma2_as_a_language_model(tmp_path: Path, precision: str) -> None:
    """Its merged model has the run's held-out loss in plain transformers: soft caps, 1 + w norms, tied head."""
    work = make_work(tmp_path / "work", "gemma2")
    is_nf4 = precision == "nf4"
    dtype = "bfloat16" if is_nf4 else "float32"
    settings = [
        *SFT_MA,
        "data.format=text",
        "optimizer.learning_rate=0.01",
        f"model.dtype={dtype}",
        f"model.quantization={'nf4' if is_nf4 else 'none'}",
        f"export.merged_dtype={dtype}",
    ]
    run = train(work, "zero3_sft_ma", settings)
    merged = run.folder / "merged"
    rows = [json.loads(line) for line in (work / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
    model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    assert model.config._attn_implementation == "eager" and model.dtype == getattr(torch, dtype)
    assert "lm_head.weight" not in load_file(merged / "model.safetensors")
    tokenizer: Any = AutoTokenizer.from_pretrained(merged)
    total, count = 0.0, 0
    for start in range(0, len(rows), 8):
        texts = [f"{row['text']} </s>" for row in rows[start : start + 8]]
        batch = tokenizer(texts, padding=True, pad_to_multiple_of=8, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
        total += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        count += int((labels != -100).sum())
    summary = run.summary
    assert count == run.of_kind("eval")[-1]["num_tokens"]
    assert summary["heldout_loss_after"] < summary["heldout_loss_before"] - 0.2
    # In 16 bits the products of other batch shapes are rounded in another order.
    tolerance = 1e-3 if is_nf4 else 1e-5
    assert total / count == pytest.approx(summary["heldout_loss_after"], rel=0, abs=tolerance)


def test_an_instruction_and_a_limit_of_positions(tmp_path: Path) -> None:
    """BERT with 22 positions: texts that are longer lose their end, never the instruction. One rank, every weight."""
    work = make_work(tmp_path / "work", "bert")
    instruction = "mood : {text} : mood"
    for name in ("train", "eval"):
        rows = [json.loads(line) for line in (work / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        rows[3]["text_pair"] += " w0" * 40
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    # A colon is a token of its own, and so is every word: [CLS] mood : 16 words : mood [SEP].
    rows[3]["text_pair"] = " ".join(rows[3]["text_pair"].split()[: 16 - len(rows[3]["text"].split())])
    full = ["method.name=full", f"data.instruction={instruction}", "optimizer.learning_rate=0.005"]
    arguments = ["--config", "zero3_full", *set_words([*COMMON, *CLASSIFIER, *full])]
    arguments = without(arguments, "method.density")
    (rank,) = train_in_forks([arguments], [work])
    assert rank.exit_code == 0, rank
    logits, labels = plain_logits(work / "run" / "merged", rows, pairs=False, instruction=instruction)
    lines = (work / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    summary = json.loads(lines[-1])
    assert float(F.cross_entropy(logits, labels)) == pytest.approx(summary["heldout_loss_after"], rel=0, abs=1e-5)
    assert summary["heldout_loss_after"] < summary["heldout_loss_before"] - 0.2


def test_an_encoder_is_no_language_model(tmp_path: Path) -> None:
    work = make_work(tmp_path / "work", "bert")
    arguments = ["--config", "zero3_sft_ma", *set_words([*COMMON, "method.name=sft_ma"])]
    (rank,) = train_in_forks([arguments], [work])
    assert rank.exit_code == USER_ERROR_EXIT_CODE, rank
    assert "model.task: got causal_lm" in rank.stderr and "Traceback" not in rank.stderr
    assert not (work / "run").exists()
