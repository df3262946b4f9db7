"""Our scores of local files against lm-evaluation-harness, and the tasks in configs/tasks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from sparse_ds.config.errors import UserError
from sparse_ds.evaluation.harness import HarnessTasks
from sparse_ds.evaluation.offline import evaluate_saved

TASKS = Path(__file__).resolve().parents[2] / "configs" / "tasks"
CHOICE_YAML = """
task: quiz
dataset_path: json
dataset_kwargs: {data_files: {test: quiz.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{query}}"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WORD_YAML = """
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: words.jsonl}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{context}}"
doc_to_target: "{{' ' + continuation}}"
metric_list: [{metric: perplexity, aggregation: perplexity}, {metric: acc}]
"""
OPEN_YAML = """
task: open
dataset_path: json
dataset_kwargs: {data_files: {test: open.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
filter_list: [{name: word, filter: [{function: regex, regex_pattern: "([a-z]+)"}, {function: take_first}]}]
"""
NOUNS = ["sweet.", "spoon.", "plate.", "in the shop.", "Mia"]


def rows_of(folder: Path, name: str, yaml: str, rows: list[dict[str, Any]]) -> list[str]:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / f"{name}.yaml").write_text(yaml, encoding="utf-8")
    return [str(folder / f"{name}.jsonl"), str(folder / f"{name}.yaml")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` makes of the files goes away with the test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_the_same_scores(tmp_path: Path) -> None:
    questions = ["The opposite of sour is", "Leo has a brown", "Where is Mia?", "The last word is"]
    quiz = [
        {"query": query, "choices": NOUNS[: 2 + number], "gold": number % 2} for number, query in enumerate(questions)
    ]
    words = [{"context": query, "continuation": noun} for query, noun in zip(questions, NOUNS, strict=False)]
    asked = [{"question": query, "answer": noun.rstrip(".")} for query, noun in zip(questions, NOUNS, strict=False)]
    own_quiz, harness_quiz = rows_of(tmp_path, "quiz", CHOICE_YAML, quiz)
    own_words, harness_words = rows_of(tmp_path, "words", WORD_YAML, words)
    own_open, harness_open = rows_of(tmp_path, "open", OPEN_YAML, asked)
    settings = {"answer_pattern": "([a-z]+)", "stop": ["\n"], "max_new_tokens": 8}
    scores = evaluate_saved(
        "embedded",
        [own_quiz, own_words, json.dumps({"source": own_open, **settings}), harness_quiz, harness_words, harness_open],
        dtype="float32",
        batch_size=3,
    )
    own = {task["task"]: task for task in scores.record["tasks"]}
    theirs = scores.record["lm_eval"]["results"]
    assert own["quiz"]["accuracy"] == theirs["quiz"]["acc,none"]
    assert own["quiz"]["accuracy_norm"] == theirs["quiz"]["acc_norm,none"]
    assert own["quiz"]["accuracy_stderr"] == pytest.approx(theirs["quiz"]["acc_stderr,none"])
    # Batches of other shapes: fp32 sums in another order.
    assert own["words"]["perplexity_per_row"] == pytest.approx(theirs["words"]["perplexity,none"], rel=1e-4)
    assert own["words"]["accuracy"] == theirs["words"]["acc,none"]
    assert own["open"]["accuracy"] == theirs["open"]["exact_match,word"]
    shown = {(row.task, row.metric): row for row in scores.rows}
    assert shown["quiz", "acc"].num_samples == 4
    assert shown["open", "exact_match (word)"].note == "lm_eval, 0-shot"


def test_what_the_harness_cannot_do_is_said_before_a_model_is_loaded(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(CHOICE_YAML, encoding="utf-8")
    for task, settings, expected in (
        ("piqua", {}, "task piqua: neither a file nor a task that lm-evaluation-harness knows. Did you mean piqa?"),
        ("nothing.yaml", {}, "task nothing.yaml: no such file"),
        (str(broken), {}, f"Its data files are looked for in {tmp_path}; --data-folder names another"),
        (str(broken), {"data_folder": tmp_path / "no"}, "is no folder"),
    ):
        with pytest.raises(UserError) as raised:
            evaluate_saved("no such model", [task], **settings)
        assert expected in str(raised.value)


@pytest.mark.skipif("SPARSE_DS_ASSETS" not in os.environ, reason="SPARSE_DS_ASSETS names no folder")
def test_the_tasks_in_configs() -> None:
    folder = Path(os.environ["SPARSE_DS_ASSETS"]) / "eval"
    names = [
        name for name in ("piqa", "arc_easy", "arc_challenge", "copa", "boolq", "commonsense_qa", "lambada_openai")
    ]
    own = json.dumps({"source": str(folder / "piqa.jsonl"), "prompt": "{query}Answer:"})
    scores = evaluate_saved(
        str(Path(os.environ["SPARSE_DS_ASSETS"]) / "models" / "stories260K-hf"),
        [own, str(folder / "lambada_openai.jsonl"), *(str(TASKS / f"{name}.yaml") for name in names)],
        num_samples=20,
        data_folder=folder,
    )
    results = scores.record["lm_eval"]["results"]
    assert set(results) == {f"{name}_local" for name in names}
    assert scores.record["tasks"][0]["accuracy"] == results["piqa_local"]["acc,none"]
    assert scores.record["tasks"][0]["accuracy_norm"] == results["piqa_local"]["acc_norm,none"]
    words = scores.record["tasks"][1]
    assert words["accuracy"] == results["lambada_openai_local"]["acc,none"]
    assert words["perplexity_per_row"] == pytest.approx(results["lambada_openai_local"]["perplexity,none"], rel=1e-4)
    # Its answers take long; that it loads, with its few-shot samples, is enough.
    HarnessTasks([str(TASKS / "gsm8k.yaml")], folder)
