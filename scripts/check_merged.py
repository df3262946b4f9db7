#!/usr/bin/env python3
"""Does the merged model of a run load in plain transformers, and is it the model that was trained?

    python scripts/check_merged.py runs/quickstart [more runs] [--eval rows.jsonl]

Nothing of sparse_ds is imported: prompt, mask and loss are written again here from their definition, for rows of
`instruction`, `input` and `output`.

    ids       = BOS + ids(Alpaca prompt) + ids(output) + EOS, cut at data.sequence_length
    batches   = rows in their order, as many as the run took, padded on the right to a multiple of 8 tokens
    loss      = mean of -log p over the tokens of output + EOS of all rows (nats)
    expected  = heldout_loss_after in the summary of the run's metrics.jsonl

With batches of the run's shapes on the run's device the two are equal to the last digit. The tolerance is for a run on
GPUs, whose bf16 products are rounded in another order than here on the CPU; a fine-tuning moves the loss by far more.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

EMBEDDED_EVAL = Path(__file__).resolve().parent.parent / "sparse_ds" / "embedded" / "instructions_eval.jsonl"
TOLERANCE = 1e-3
IGNORED_LABEL = -100
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

Encoded = tuple[list[int], list[int]]


def encode(row: dict[str, str], tokenizer: Any, sequence_length: int) -> Encoded:
    """Ids and labels of one row; the prompt has no labels."""
    template = WITH_INPUT if row.get("input", "").strip() else WITHOUT_INPUT
    prompt = [tokenizer.bos_token_id, *tokenizer(template.format_map(row), add_special_tokens=False)["input_ids"]]
    answer = [*tokenizer(row["output"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    labels = [IGNORED_LABEL] * len(prompt) + answer
    return (prompt + answer)[:sequence_length], labels[:sequence_length]


@torch.no_grad()
def heldout_loss(model_folder: Path, rows: list[dict[str, str]], sequence_length: int, batch_size: int) -> float:
    """Mean loss per labelled token of a merged model."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto").eval()
    encoded = [encode(row, tokenizer, sequence_length) for row in rows]
    total_nll, num_tokens = 0.0, 0
    for start in range(0, len(encoded), batch_size):
        batch = encoded[start : start + batch_size]
        length = math.ceil(max(len(ids) for ids, _ in batch) / 8) * 8
        input_ids = torch.full((len(batch), length), tokenizer.eos_token_id)
        attention_mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, IGNORED_LABEL)
        for place, (ids, row_labels) in enumerate(batch):
            input_ids[place, : len(ids)] = torch.tensor(ids)
            labels[place, : len(ids)] = torch.tensor(row_labels)
            attention_mask[place, : len(ids)] = 1
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1].float()
        targets = labels[:, 1:]
        total_nll += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        num_tokens += int((targets != IGNORED_LABEL).sum())
    return total_nll / num_tokens


def expected_loss(run: Path) -> float:
    """The held-out loss at the end of a run, as the run measured it."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return float(next(record for record in records if record["kind"] == "summary")["heldout_loss_after"])


def check(run: Path, eval_file: Path | None) -> bool:
    """Print one line about a run; True if the losses agree."""
    config: dict[str, Any] = json.loads((run / "resolved_config.json").read_text(encoding="utf-8"))
    data, train = config["data"], config["train"]
    rows_file = eval_file or (EMBEDDED_EVAL if data["eval"] == "embedded:eval" else Path(data["eval"]))
    rows = [json.loads(line) for line in rows_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    loss = heldout_loss(
        run / "merged",
        rows[: data["num_eval_samples"]],
        data["sequence_length"],
        train["eval_micro_batch_size"] or train["micro_batch_size"],
    )
    expected = expected_loss(run)
    agrees = math.isclose(loss, expected, rel_tol=0, abs_tol=TOLERANCE)
    print(f"{'ok' if agrees else 'FAILED'}: {run / 'merged'}: held-out loss {loss:.6f}, of the run {expected:.6f}")
    return agrees


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare merged models in plain transformers with their runs.")
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of runs")
    parser.add_argument("--eval", type=Path, help="JSONL rows to measure on; default: data.eval of the run")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    all_agree = all([check(run, arguments.eval) for run in arguments.runs])
    loaded = sorted(name for name in sys.modules if name.partition(".")[0] == "sparse_ds")
    assert not loaded, f"this check must not use the project itself, but it imported {loaded}"
    return 0 if all_agree else 1


if __name__ == "__main__":
    sys.exit(main())
