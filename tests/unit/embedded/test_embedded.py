"""The embedded model and data: small, loadable by plain transformers, and an instruction task still to be learned."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_ds.config.errors import UserError
from sparse_ds.embedded import EMBEDDED_MODEL, resolve_data, resolve_model

MODEL_FOLDER = Path(resolve_model(EMBEDDED_MODEL))
# Written out here, not imported: the wording of Stanford Alpaca, which a data format of the same name has to use.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def read_rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(resolve_data(name)).read_text(encoding="utf-8").splitlines()]


def format_prompt(row: dict[str, str]) -> str:
    return (WITH_INPUT if row["input"] else WITHOUT_INPUT).format(**row)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, str]]]:
    return {"train": read_rows("embedded:train"), "eval": read_rows("embedded:eval")}


def test_sizes() -> None:
    assert sum(path.stat().st_size for path in MODEL_FOLDER.glob("*.safetensors")) <= 2_000_000
    assert sum(Path(resolve_data(f"embedded:{part}")).stat().st_size for part in ("train", "eval")) <= 500_000


def test_model_is_a_small_llama_with_grouped_heads_in_bf16(model) -> None:
    config = model.config
    assert config.model_type == "llama"
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.intermediate_size % 64, "the embedded model covers sizes that are not a multiple of an NF4 block"
    assert config.max_position_embeddings == 512
    assert AutoModelForCausalLM.from_pretrained(MODEL_FOLDER).dtype == torch.bfloat16


def test_tokenizer_and_model_agree_on_special_tokens(tokenizer, model) -> None:
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert len(set(special)) == 3, f"beginning, end and padding need an id each, got {special}"
    assert special == (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id)
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer("Tom")["input_ids"][0] == tokenizer.bos_token_id


@pytest.mark.parametrize(
    "text", ["Tom has a red ball.", " two  spaces\tand\n\nlines ", "### Response:\n", "Zoë: 日本 + 2.5 %", ""]
)
def test_tokenizer_round_trip(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_tokenizer_json_and_sentencepiece_agree(tokenizer, rows) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(MODEL_FOLDER / "tokenizer.model"))
    for row in rows["eval"]:
        text = format_prompt(row) + row["output"]
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == processor.encode(text)


def test_prompt_and_completion_tokenize_independently(tokenizer, rows) -> None:
    for row in rows["eval"]:
        prompt, output, both = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (format_prompt(row), row["output"], format_prompt(row) + row["output"])
        )
        assert prompt + output == both


def test_rows_are_alpaca_rows_and_held_out_rows_are_new(rows) -> None:
    assert 2000 <= len(rows["train"]) <= 3000
    assert 150 <= len(rows["eval"]) <= 300
    for row in rows["train"] + rows["eval"]:
        assert list(row) == ["instruction", "input", "output"]
        assert row["instruction"] and row["output"]
    questions = {part: [(row["instruction"], row["input"]) for row in rows[part]] for part in rows}
    assert not set(questions["train"]) & set(questions["eval"])
    for part, asked in questions.items():
        assert len(set(asked)) == len(asked), f"{part}: a question occurs twice"


def test_rows_are_short(tokenizer, rows) -> None:
    texts = [format_prompt(row) + row["output"] for row in rows["train"] + rows["eval"]]
    longest = max(len(ids) + 1 for ids in tokenizer(texts)["input_ids"])  # + 1: the end mark
    assert longest <= 128


@torch.no_grad()
def test_base_knows_english_and_not_the_task(model, tokenizer, rows) -> None:
    """The held-out completions are still to be learned, while a text like the pretraining text is well predicted."""
    total, num_tokens = 0.0, 0
    for row in rows["eval"]:
        prompt = tokenizer(format_prompt(row))["input_ids"]
        completion = [*tokenizer(row["output"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(completion), reduction="sum").item()
        num_tokens += len(completion)
    assert 2.0 < total / num_tokens < 5.0

    story = "Tom has a red ball. Anna is in the garden. The ball is red. The opposite of hot is cold."
    input_ids = torch.tensor([tokenizer(story)["input_ids"]])
    assert model(input_ids=input_ids, labels=input_ids).loss.item() < 1.5


def test_other_names_are_left_alone() -> None:
    assert resolve_model("meta-llama/Llama-2-7b-hf") == "meta-llama/Llama-2-7b-hf"
    assert resolve_model("./embedded") == "./embedded"
    assert resolve_data("data/train.jsonl") == "data/train.jsonl"


@pytest.mark.parametrize("name", ["embedded", "embedded:", "embedded:test", "embedded:Train"])
def test_unknown_embedded_data_is_an_error_that_names_what_exists(name: str) -> None:
    with pytest.raises(UserError, match=rf"{name!r}; expected one of 'embedded:train', 'embedded:eval'"):
        resolve_data(name)


def test_unknown_embedded_model_is_an_error_that_names_what_exists() -> None:
    with pytest.raises(UserError, match="'embedded:big'; expected 'embedded'"):
        resolve_model("embedded:big")


def test_resolving_paths_imports_no_torch() -> None:
    code = "import sys, sparse_ds.embedded as e; e.resolve_model('embedded'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
