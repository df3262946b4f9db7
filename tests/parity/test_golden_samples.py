"""Every format in every template: token ids and mask are the golden ones, which transformers and an oracle give too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from golden_samples import FOLDER, ROWS, ZEPHYR, cases, golden_tokenizer, oracle

from sparse_ds.data import build_dataset


def golden(format_name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / f"{format_name}.json").read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("format_name", ROWS)
def test_files_are_complete(format_name: str) -> None:
    assert golden(format_name)["row"] == ROWS[format_name]
    assert list(golden(format_name)["templates"]) == [template for name, template in cases() if name == format_name]


@pytest.mark.parametrize(("format_name", "template"), cases())
def test_golden_ids_and_mask(tmp_path: Path, format_name: str, template: str) -> None:
    expected = golden(format_name)["templates"][template]
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[format_name]) + "\n")
    (tmp_path / "zephyr.jinja").write_text(ZEPHYR)
    tokenizer = golden_tokenizer()
    name = str(tmp_path / "zephyr.jinja") if template == "file" else template
    data = build_dataset(tmp_path / "rows.jsonl", tokenizer, template=name)
    assert data.format_name == format_name
    (sample,) = data.dataset
    assert sample["input_ids"] == expected["input_ids"]
    assert [int(label != -100) for label in sample["labels"]] == expected["mask"]
    assert all(label in (-100, token) for label, token in zip(sample["labels"], sample["input_ids"], strict=True))
    assert oracle(format_name, template) == (expected["input_ids"], expected["mask"])
    # Every answer ends with EOS, which is learned, and the pad token is nowhere.
    assert expected["learned"].endswith("</s>")
    assert tokenizer.pad_token_id not in expected["input_ids"]


@pytest.mark.parametrize("template", ["alpaca", "chatml", "llama-2", "mistral"])
def test_transformers_marks_the_same_tokens(tmp_path: Path, template: str) -> None:
    expected = golden("messages")["templates"][template]
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS["messages"]) + "\n")
    tokenizer = golden_tokenizer()
    build_dataset(tmp_path / "rows.jsonl", tokenizer, template=template)
    rendered = tokenizer.apply_chat_template(
        ROWS["messages"]["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert rendered["input_ids"] == expected["input_ids"]
    assert rendered["assistant_masks"] == expected["mask"]
