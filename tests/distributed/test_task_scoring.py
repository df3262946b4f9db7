"""Tasks of a run under ZeRO-3: every likelihood and every answer against one text at a time in plain transformers.

Numbers of rows that the ranks cannot share evenly, prompts of different lengths, answers that end at different places.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_ds.config.schema import RunConfig
from sparse_ds.distributed.launch_environment import complete_environment
from sparse_ds.evaluation import scoring
from sparse_ds.monitor.metrics_log import read_metrics
from sparse_ds.training import run as run_module

CHOICES = ["dog", "key of the sun", "list"]
NUM_QUIZ, NUM_OPEN, NUM_NEW = 7, 5, 6
"""Batches of 2: 9 of 17 choices, 3 of 5 prompts. Neither can be shared by 2 ranks."""


def quiz_rows() -> list[dict[str, Any]]:
    return [
        {"query": f"the {' number' * n} {n} is", "choices": CHOICES[: 2 + n % 2], "gold": n % 2}
        for n in range(NUM_QUIZ)
    ]


def open_rows() -> list[dict[str, Any]]:
    return [{"question": f"the list {'of the key ' * n}is number", "answer": str(n)} for n in range(NUM_OPEN)]


def run_and_record(settings: dict[str, Any]) -> list[tuple[str, Any]]:
    """A run of this rank, and what every task was answered: (kind, answers)."""
    seen: list[tuple[str, Any]] = []
    score_texts, generate_answers = scoring.score_texts, scoring.generate_answers

    def recorded_scores(*args: Any) -> Any:
        seen.append(("likelihoods", score_texts(*args)))
        return seen[-1][1]

    def recorded_answers(*args: Any, **kwargs: Any) -> Any:
        seen.append(("answers", generate_answers(*args, **kwargs)))
        return seen[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "score_texts", recorded_scores)
        patch.setattr(scoring, "generate_answers", recorded_answers)
        run_module.run(RunConfig.model_validate(settings), complete_environment(os.environ), "cpu")
    return seen


@torch.no_grad()
def plain_answers(folder: Path, stop: str | None) -> tuple[list[tuple[float, bool]], list[str]]:
    """(likelihoods of all choices, greedy answers), without batches, padding or cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def log_probabilities(ids: list[int]) -> torch.Tensor:
        logits_TV: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0].double()
        return logits_TV.log_softmax(-1)

    likelihoods = []
    for row in quiz_rows():
        for choice in row["choices"]:
            start, ids = len(tokenizer(row["query"])["input_ids"]), tokenizer(f"{row['query']} {choice}")["input_ids"]
            of_ids = log_probabilities(ids)
            total = sum(float(of_ids[t - 1, ids[t]]) for t in range(start, len(ids)))
            likelihoods.append((total, all(int(of_ids[t - 1].argmax()) == ids[t] for t in range(start, len(ids)))))
    answers = []
    for row in open_rows():
        ids, new = tokenizer(row["question"])["input_ids"], []
        while len(new) < NUM_NEW:
            token = int(log_probabilities([*ids, *new])[-1].argmax())
            if token == tokenizer.eos_token_id:
                break
            new.append(token)
            if stop is not None and stop in tokenizer.decode(new):
                break
        text = tokenizer.decode(new, skip_special_tokens=True)
        answers.append(text if stop is None else text.split(stop)[0])
    return likelihoods, answers


def test_two_ranks_answer_as_one_model(tmp_path: Path, tiny_base: Path, tiny_data: Path) -> None:
    for name, rows in (("quiz", quiz_rows()), ("open", open_rows())):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    unstopped = plain_answers(tiny_base, None)[1]
    # A word at which some answers end early and others do not.
    words = sorted({word for answer in unstopped for word in answer.split()})
    stop = next(word for word in words if 0 < sum(word in answer for answer in unstopped) < NUM_OPEN)
    settings = {
        "model": {"name_or_path": str(tiny_base), "quantization": "none", "dtype": "float32"},
        "data": {
            "train": str(tiny_data),
            "eval": None,
            "sequence_length": 32,
            "tasks": [
                {"source": str(tmp_path / "quiz.jsonl")},
                {"source": str(tmp_path / "open.jsonl"), "max_new_tokens": NUM_NEW, "stop": [stop]},
            ],
        },
        "method": {"name": "sparta", "density": 0.1},
        "optimizer": {"learning_rate": 0.01},
        "train": {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 2,
            "micro_batch_size": 2,
            "eval_micro_batch_size": 2,
            "cpu_threads": 1,
        },
        "export": {"merged_dtype": "float32"},
        "monitor": {"progress_bar": False, "num_sample_prompts": 0},
    }
    of_rank_0, of_rank_1 = run_ranks(2, run_and_record, settings, join_group=False)
    assert of_rank_0 == of_rank_1
    assert [kind for kind, _ in of_rank_0] == ["likelihoods", "answers"] * 2
    for place, folder in ((0, tiny_base), (2, tmp_path / "run" / "merged")):
        likelihoods, answers = plain_answers(folder, stop)
        for found, (total, is_greedy) in zip(of_rank_0[place][1], likelihoods, strict=True):
            # fp32 sums in another order.
            assert found.log_probability == pytest.approx(total, abs=1e-4)
            assert found.is_greedy == is_greedy
        assert of_rank_0[place + 1][1] == answers
    assert of_rank_0[0] != of_rank_0[2], "training changed nothing"

    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = read_metrics(metrics, "task")
    assert [(line["step"], line["task"], line["num_samples"]) for line in lines] == [
        (step, task, count) for step in (0, 2) for task, count in (("quiz", NUM_QUIZ), ("open", NUM_OPEN))
    ]
    sums = iter(likelihoods)
    right = 0
    for row in quiz_rows():
        of_choices = [next(sums)[0] for _ in row["choices"]]
        right += of_choices.index(max(of_choices)) == row["gold"]
    assert lines[2]["accuracy"] == pytest.approx(right / NUM_QUIZ)
    (summary,) = read_metrics(metrics, "summary")
    chance = sum(1 / len(row["choices"]) for row in quiz_rows()) / NUM_QUIZ
    assert summary["tasks"] == [
        {
            "task": name,
            "num_samples": count,
            "accuracy_before": lines[number]["accuracy"],
            "accuracy_after": lines[2 + number]["accuracy"],
            "chance": pytest.approx(chance) if name == "quiz" else None,
        }
        for number, (name, count) in enumerate((("quiz", NUM_QUIZ), ("open", NUM_OPEN)))
    ]
