"""A classification from the command to the merged model: any number of ranks, any cut into micro batches, going on.

Tiny and in fp32, so that runs can be compared to the last digits. The tokenizer has no pad token: EOS pads.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from finished_runs import FinishedRun
from forks import train_in_forks
from safetensors.torch import load_file
from short_run import set_words
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from sparse_ds.cli import USER_ERROR_EXIT_CODE

METHOD = "sft_ma"
EVENT_KEYS = ("method.interval_steps", "method.estimation_steps")
LABELS = ("bad", "fair", "good")
HINTS = {"bad": "angry", "fair": "plain", "good": "happy"}
WORDS = ["<unk>", "<s>", "</s>", *HINTS.values(), *LABELS, *(f"w{number}" for number in range(6))]
NUM_STEPS = 24
LOSS_TOLERANCE = 1e-5
"""Losses of about 1 in fp32: sums over 16 samples in another order, through a few steps."""
ARGUMENTS = (
    "--config",
    "zero3_sft_ma",
    *set_words(
        [
            "model.name_or_path=base",
            "model.task=sequence_classification",
            "model.dtype=float32",
            "model.quantization=none",
            "data.train=train.jsonl",
            "data.eval=eval.jsonl",
            f"method.name={METHOD}",
            "method.density=0.2",
            "optimizer.learning_rate=0.03",
            "method.interval_steps=5",
            "method.estimation_steps=2",
            f"train.max_steps={NUM_STEPS}",
            "train.global_batch_size=16",
            "train.output_dir=run",
            "train.cpu_threads=1",
            "train.eval_micro_batch_size=8",
            "checkpoint.interval_steps=12",
            "export.merged_dtype=float32",
            "monitor.progress_bar=false",
        ]
    ),
)


def save_base(folder: Path) -> None:
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 1,
        hidden_size=36,
        intermediate_size=46,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=32,
        attention_bias=True,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def save_rows(path: Path, count: int, *, seed: int) -> None:
    """The label is that of the hint word. A few texts end with the EOS token, which also pads."""
    generator = random.Random(seed)
    rows = []
    for number in range(count):
        label = generator.choice(LABELS)
        words = [f"w{generator.randrange(6)}" for _ in range(generator.randrange(1, 6))]
        words.insert(generator.randrange(len(words) + 1), HINTS[label])
        ending = " </s>" if number % 5 == 0 else ""
        rows.append({"sentence": " ".join(words) + ending, "label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classification") / "work"
    folder.mkdir()
    save_base(folder / "base")
    save_rows(folder / "train.jsonl", 400, seed=1)
    save_rows(folder / "eval.jsonl", 31, seed=2)
    return folder


def train(folder: Path, num_ranks: int, *settings: str) -> FinishedRun:
    """A run in `folder`; its output folder is `run`."""
    ranks = train_in_forks([[*ARGUMENTS, *set_words(settings)]] * num_ranks, [folder] * num_ranks)
    assert [rank.exit_code for rank in ranks] == [0] * num_ranks, ranks
    output = next((s.removeprefix("train.output_dir=") for s in settings if s.startswith("train.output_dir=")), "run")
    return FinishedRun.read(folder / output)


@pytest.fixture(scope="module")
def two_ranks(work: Path) -> FinishedRun:
    return train(work, 2, "train.micro_batch_size=4")


def test_it_learns(two_ranks: FinishedRun) -> None:
    summary = two_ranks.summary
    assert summary["heldout_scores_before"]["accuracy"] < 0.6
    assert summary["heldout_scores_after"]["accuracy"] > 0.9
    assert summary["heldout_loss_after"] < 0.5 < summary["heldout_loss_before"]
    assert [record["num_samples"] for record in two_ranks.of_kind("eval")] == [31, 31]
    sparse = sum(tensor.numel() for name, tensor in two_ranks.adapter.items() if name.endswith(".values"))
    assert summary["num_trained_weights"] == sparse + len(LABELS) * 36


@pytest.mark.parametrize("micro_batch_size", [4, 16], ids=["four micro batches", "one micro batch"])
def test_one_rank_trains_as_two_do(work: Path, two_ranks: FinishedRun, micro_batch_size: int) -> None:
    """The loss is the mean over the samples of the whole step, however they are dealt."""
    output = f"one_by_{micro_batch_size}"
    one = train(work, 1, f"train.micro_batch_size={micro_batch_size}", f"train.output_dir={output}")
    assert len(one.losses) == NUM_STEPS
    assert one.losses == pytest.approx(two_ranks.losses, rel=0, abs=LOSS_TOLERANCE)
    assert one.index_hashes == two_ranks.index_hashes
    assert torch.allclose(one.adapter["score.weight"], two_ranks.adapter["score.weight"], rtol=0, atol=1e-4)
    for field in ("heldout_loss_before", "heldout_loss_after"):
        assert one.summary[field] == pytest.approx(two_ranks.summary[field], rel=0, abs=LOSS_TOLERANCE)


def test_it_goes_on_from_a_checkpoint(tmp_path: Path, two_ranks: FinishedRun) -> None:
    """On one rank from a checkpoint of two."""
    work = Path(shutil.copytree(two_ranks.folder.parent, tmp_path / "work"))
    (work / "run" / "checkpoint-24").rename(work / "run" / "left-out")
    shutil.rmtree(work / "run" / "left-out")
    resumed = train(work, 1, "train.micro_batch_size=4", "checkpoint.resume=auto")
    assert resumed.losses == pytest.approx(two_ranks.losses, rel=0, abs=LOSS_TOLERANCE)
    assert resumed.summary["heldout_scores_before"] == two_ranks.summary["heldout_scores_before"]
    assert torch.allclose(resumed.adapter["score.weight"], two_ranks.adapter["score.weight"], rtol=0, atol=1e-4)


def test_other_labels_are_another_run(work: Path, two_ranks: FinishedRun) -> None:
    arguments = [
        *ARGUMENTS,
        *set_words(['data.labels=["good","fair","bad"]', "train.max_steps=30"]),
        "--resume",
        "auto",
    ]
    ranks = train_in_forks([arguments], [work])
    assert ranks[0].exit_code == USER_ERROR_EXIT_CODE and "labels" in ranks[0].stderr, ranks


def test_the_adapter_holds_the_head(two_ranks: FinishedRun) -> None:
    config = json.loads((two_ranks.folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["task"] == "sequence_classification"
    assert config["labels"] == list(LABELS)
    assert config["dense_shapes"] == {"score.weight": [3, 36]}
    head = two_ranks.adapter["score.weight"]
    assert head.dtype == torch.float32 and head.shape == (3, 36)


def test_plain_transformers_classifies_as_the_run_did(work: Path, two_ranks: FinishedRun) -> None:
    """The merged folder alone, with the padding that its tokenizer and its model agree on."""
    merged = two_ranks.folder / "merged"
    model = AutoModelForSequenceClassification.from_pretrained(merged)
    assert model.config.id2label == dict(enumerate(LABELS)) and model.config.pad_token_id == 2
    assert model.config.problem_type == "single_label_classification"
    tokenizer: Any = AutoTokenizer.from_pretrained(merged)
    tokenizer.pad_token = tokenizer.eos_token
    rows = [json.loads(line) for line in (work / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
    batch = tokenizer([row["sentence"] for row in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([model.config.label2id[row["label"]] for row in rows])
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    summary = two_ranks.summary
    assert float(F.cross_entropy(logits, labels)) == pytest.approx(summary["heldout_loss_after"], rel=0, abs=1e-5)
    accuracy = summary["heldout_scores_after"]["accuracy"]
    assert float((logits.argmax(-1) == labels).float().mean()) == pytest.approx(accuracy)


def test_what_did_not_train_is_the_base(work: Path, two_ranks: FinishedRun) -> None:
    base = load_file(work / "base" / "model.safetensors")
    merged = load_file(two_ranks.folder / "merged" / "model.safetensors")
    assert merged.keys() == base.keys() - {"lm_head.weight"} | {"score.weight"}
    for name in merged.keys() & base.keys():
        indices = two_ranks.adapter.get(f"{name.removesuffix('.weight')}.indices", torch.empty(0)).long()
        same = merged[name].view(-1) == base[name].view(-1)
        same[indices] = True
        assert bool(same.all()), name


def test_biases_and_norms_train_and_merge(work: Path) -> None:
    """SpaRTA with everything that it can train: two ranks, then one from their checkpoint, then plain transformers."""
    settings = ["method.name=sparta", "method.train_biases=true", "method.train_norms=true"]
    settings += ["train.output_dir=sparta", "train.micro_batch_size=4", "optimizer.learning_rate=0.01"]
    arguments = without([*ARGUMENTS, *set_words(settings)], *EVENT_KEYS)
    arguments[1] = "zero3_full"
    ranks = train_in_forks([arguments] * 2, [work] * 2)
    assert [rank.exit_code for rank in ranks] == [0, 0], ranks
    two = FinishedRun.read(work / "sparta")
    trained = {name.removesuffix(".values") for name in two.adapter if name.endswith(".values")}
    biases = {name for name in trained if name.endswith(".bias")}
    norms = {name for name in trained if name.endswith("norm")}
    assert len(biases) == 8 and len(norms) == 5 and len(trained) == 14 + 8 + 5
    assert all(bool(two.adapter[f"{name}.values"].any()) for name in biases | norms if "k_proj" not in name)
    assert two.summary["heldout_scores_after"]["accuracy"] > 0.9
    assert heldout_loss_of(work, work / "sparta" / "merged") == pytest.approx(
        two.summary["heldout_loss_after"], rel=0, abs=1e-5
    )
    shutil.rmtree(work / "sparta" / f"checkpoint-{NUM_STEPS}")
    ranks = train_in_forks([[*arguments, "--resume", "auto"]], [work])
    assert ranks[0].exit_code == 0, ranks
    one = FinishedRun.read(work / "sparta")
    assert one.losses == pytest.approx(two.losses, rel=0, abs=LOSS_TOLERANCE)


def heldout_loss_of(work: Path, merged: Path) -> float:
    """In plain transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(merged)
    tokenizer: Any = AutoTokenizer.from_pretrained(merged)
    tokenizer.pad_token = tokenizer.eos_token
    rows = [json.loads(line) for line in (work / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
    batch = tokenizer([row["sentence"] for row in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([model.config.label2id[row["label"]] for row in rows])
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return float(F.cross_entropy(logits, labels))


def without(arguments: list[str], *keys: str) -> list[str]:
    """The command line without the settings of some keys."""
    kept = [word for word in arguments if not word.startswith(tuple(f"{key}=" for key in keys))]
    return [
        word for word, following in zip(kept, [*kept[1:], ""], strict=True) if word != "--set" or following != "--set"
    ]


def test_full_training_and_label_words(work: Path) -> None:
    run = "full"
    settings = [
        "method.name=full",
        f"train.output_dir={run}",
        "model.head_initialization=label_words",
        'model.label_words=["bad","fair","good"]',
        "optimizer.learning_rate=0.003",
        "train.micro_batch_size=16",
        "checkpoint.interval_steps=null",
    ]
    arguments = without([*ARGUMENTS, *set_words(settings)], "method.density", *EVENT_KEYS)
    arguments[1] = "zero3_full"
    ranks = train_in_forks([arguments], [work])
    assert ranks[0].exit_code == 0, ranks
    model = AutoModelForSequenceClassification.from_pretrained(work / run / "merged")
    assert model.config.id2label == dict(enumerate(LABELS))
    (summary,) = [
        record
        for line in (work / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        if (record := json.loads(line))["kind"] == "summary"
    ]
    assert summary["heldout_scores_after"]["accuracy"] > 0.9
