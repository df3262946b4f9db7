"""`sparse-ds export`: every format it writes here, its options and its mistakes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from adapter_items import MakeAdapter, MakeBase
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_ds.adapter.native import load_adapter
from sparse_ds.cli import main


def export(*words: object) -> int:
    return main(["export", *map(str, words), "--device", "cpu"])


def test_merged_and_verified(
    make_base: MakeBase, make_adapter: MakeAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = make_base(), make_adapter(quantization="nf4")
    assert export(adapter, tmp_path / "out", "--base-model", base, "--verify", "--max-shard-size", "6KB") == 0
    printed = capsys.readouterr().out
    assert "153 deltas, 153 not zero" in printed and "the 4-bit base differs from the original weights by" in printed
    assert "equal in every bit" in printed and "warning" not in printed
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    words = (adapter, tmp_path / "out", "--base-model", base, "--base", "original", "--dtype", "float32")
    assert export(*words) == 2
    assert "already exists and is not empty" in capsys.readouterr().err
    assert export(*words, "--overwrite") == 0
    assert "warning: the 4-bit base differs" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32


def test_native_with_short_indices_and_back(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = make_adapter()
    assert export(adapter, tmp_path / "short", "--format", "native", "--index-encoding", "delta") == 0
    assert export(tmp_path / "short", tmp_path / "plain", "--format", "native") == 0
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "plain" / file).read_bytes() == (adapter / file).read_bytes()
    assert load_adapter(tmp_path / "short").stored.index_encoding == "delta"


def test_the_template_of_the_run_goes_along(make_base: MakeBase, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    base, run = make_base(), tmp_path / "run"
    run.mkdir()
    (run / "resolved_config.json").write_text("{}")
    make_adapter().rename(run / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "of the run"
    tokenizer.save_pretrained(run / "tokenizer")
    assert export(run, tmp_path / "out", "--base-model", base) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "of the run"
    assert export(run, tmp_path / "other", "--base-model", base, "--tokenizer", base) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "other").chat_template != "of the run"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "native", "--verify"], "--verify has no effect with --format native"),
        (["--format", "native", "--revision", "main"], "--revision has no effect with --format native"),
        (["--format", "native", "--max-shard-size", "1GB"], "--max-shard-size has no effect with --format native"),
        (["--index-encoding", "delta"], "--index-encoding has no effect with --format merged"),
        (["--base-model", "no/such/folder"], "no/such/folder"),
        (["--max-shard-size", "big"], "max_shard_size is 'big'"),
    ],
)
def test_mistakes(
    make_base: MakeBase,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    base = [] if "--base-model" in words else ["--base-model", make_base()]
    adapter, before = make_adapter(), sorted(os.listdir(tmp_path))
    capsys.readouterr()
    assert export(adapter, tmp_path / "out", *base, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error
    assert sorted(os.listdir(tmp_path)) == before
