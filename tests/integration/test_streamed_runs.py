"""A mixture that is streamed, in a named template: on two ranks, on one, gone on from a checkpoint, and exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from finished_runs import FinishedRun
from forks import Ended, train_in_forks
from short_run import save_rows, set_words
from transformers import AutoTokenizer

from sparse_ds.data import build_prompt
from sparse_ds.data.named_templates import use_template
from sparse_ds.embedded import resolve_model

NUM_STEPS = 5
SETTINGS = (
    'data.train=[{"source":"rows.jsonl","weight":2},{"source":"talks"}]',
    "data.streaming=true",
    "data.shuffle_buffer=10",
    "data.template=chatml",
    "data.on_bad_row=skip",
    "data.num_eval_samples=4",
    "method.interval_steps=3",
    "method.estimation_steps=2",
    f"train.max_steps={NUM_STEPS}",
    "train.micro_batch_size=2",
    "train.global_batch_size=8",
    "train.cpu_threads=1",
    "checkpoint.interval_steps=2",
    "checkpoint.keep=5",
    "monitor.progress_bar=false",
    "monitor.num_sample_prompts=0",
)


def save_data(folder: Path) -> None:
    """30 Alpaca rows, and a folder with two files of ShareGPT conversations, one row of which is broken."""
    lines = save_rows(folder, 60).read_text(encoding="utf-8").splitlines()
    (folder / "rows.jsonl").write_text("\n".join(lines[:30]) + "\n", encoding="utf-8")
    talks = []
    for line in lines[30:]:
        row = json.loads(line)
        turns = [{"from": "human", "value": row["instruction"]}, {"from": "gpt", "value": row["output"]}]
        talks.append(json.dumps({"conversations": turns}))
    (folder / "talks").mkdir()
    (folder / "talks" / "a.jsonl").write_text("\n".join([*talks[:15], '{"conversations": ']) + "\n", encoding="utf-8")
    (folder / "talks" / "b.jsonl").write_text("\n".join(talks[15:]) + "\n", encoding="utf-8")


def train(folder: Path, num_ranks: int, output: str, *more: str, resume: str | None = None) -> list[Ended]:
    words = ["--config", "zero3_sft_ma", *set_words([*SETTINGS, *more, f"train.output_dir={output}"])]
    words += [] if resume is None else ["--resume", resume]
    return train_in_forks([words] * num_ranks, [folder] * num_ranks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streamed")
    save_data(folder)
    ranks = train(folder, 2, "two")
    assert [rank.exit_code for rank in ranks] == [0, 0], ranks
    assert "data.train[1].source: rows left out so far: 1. This one: talks/a.jsonl, line 16" in ranks[0].stdout
    return folder


def test_one_rank_sees_the_same_samples(folder: Path) -> None:
    (ended,) = train(folder, 1, "one", "export.merged=false")
    assert ended.exit_code == 0, ended
    one, two = FinishedRun.read(folder / "one"), FinishedRun.read(folder / "two")
    assert list(one.losses) == list(range(1, NUM_STEPS + 1))
    assert one.by_step("step", "num_tokens") == two.by_step("step", "num_tokens")
    assert len(set(one.by_step("step", "num_tokens").values())) > 1
    # bf16 sums in another order.
    assert max(abs(one.losses[step] - two.losses[step]) for step in one.losses) < 1e-2


def test_going_on(folder: Path) -> None:
    ranks = train(folder, 2, "again", "export.merged=false", resume="two/checkpoint-2")
    assert [rank.exit_code for rank in ranks] == [0, 0], ranks
    two, again = FinishedRun.read(folder / "two"), FinishedRun.read(folder / "again")
    assert again.losses == {step: loss for step, loss in two.losses.items() if step > 2}
    assert again.summary["heldout_loss_after"] == two.summary["heldout_loss_after"]


def test_another_order_is_another_run(folder: Path) -> None:
    ranks = train(folder, 1, "other", "data.shuffle_buffer=11", resume="two/checkpoint-2")
    assert ranks[0].exit_code == 2
    assert "belongs to another run (checkpoint | this run):\n  data: " in ranks[0].stderr


def test_the_merged_model_is_asked_as_it_was_trained(folder: Path) -> None:
    """Its tokenizer alone, without the name of the template, gives the ids that stood in front of an answer."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("embedded"))
    use_template(tokenizer, "chatml")
    row = {"messages": [{"role": "user", "content": "What is hot?"}, {"role": "assistant", "content": "A"}]}
    trained = build_prompt(tokenizer, row, "messages").input_ids
    for kept in ("merged", "tokenizer"):
        exported = AutoTokenizer.from_pretrained(folder / "two" / kept)
        asked = exported.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_dict=True)
        assert asked["input_ids"] == trained
    # What a run without a named template leaves is the base's.
    assert AutoTokenizer.from_pretrained(resolve_model("embedded")).chat_template is None


def test_a_broken_row_in_the_middle_ends_all_ranks(folder: Path) -> None:
    """No broken row is in the first step; the message is one, and it is no traceback."""
    ranks = train(folder, 2, "broken", "data.on_bad_row=error", "data.shuffle_buffer=1", "export.merged=false")
    assert [rank.exit_code for rank in ranks] == [2, 2], ranks
    assert "error: talks/a.jsonl, line 16: broken JSON" in ranks[0].stderr
    assert "Traceback" not in ranks[0].stderr + ranks[1].stderr
    steps = [record for record in map(json.loads, (folder / "broken" / "metrics.jsonl").read_text().splitlines())]
    assert [record["step"] for record in steps if record["kind"] == "step"]
