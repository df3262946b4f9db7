#!/usr/bin/env python3
"""Does the merged model of a run load in plain transformers, and is it the model that was trained?

    python scripts/check_merged.py runs/quickstart [more runs] [--eval rows.jsonl]

Nothing of sparse_ds is imported: prompt, mask and loss are written again here from their definition, for rows of
`instruction`, `input` and `output`.

    ids      = BOS + ids(Alpaca prompt) + ids(output) + EOS, cut at data.sequence_length
    loss     = mean of -log p over the tokens of output + EOS of all rows (nats)
    expected = heldout_loss_after in the summary of the run's metrics.jsonl

Rows go through the model one by one, without padding, where the run had padded batches: other shapes, other roundings
of bf16 products. Hence the tolerance of 0.005; the deltas of a quickstart move this loss by more than 1.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

EMBEDDED_EVAL = Path(__file__).resolve().parent.parent / "sparse_ds" / "embedded" / "instructions_eval.jsonl"
TOLERANCE = 0.005
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


def heldout_loss(model_folder: Path, rows: list[dict[str, str]], sequence_length: int) -> float:
    """Mean loss per learned token of a merged model."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto").eval()
    total_nll, num_tokens = 0.0, 0
    for row in rows:
        template = WITH_INPUT if row.get("input", "").strip() else WITHOUT_INPUT
        prompt_ids = [tokenizer.bos_token_id] + tokenizer(template.format_map(row), add_special_tokens=False)[
            "input_ids"
        ]
        answer_ids = tokenizer(row["output"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids = torch.tensor([(prompt_ids + answer_ids)[:sequence_length]])
        answer_length = ids.shape[1] - len(prompt_ids)
        if answer_length > 0:
            with torch.no_grad():
                log_p = model(input_ids=ids).logits[0, -answer_length - 1 : -1].float().log_softmax(-1)
            total_nll -= float(log_p.gather(1, ids[0, -answer_length:, None]).sum())
            num_tokens += answer_length
    return total_nll / num_tokens


def expected_loss(run: Path) -> float:
    """The held-out loss at the end of a run, as the run measured it."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return float(next(record for record in records if record["kind"] == "summary")["heldout_loss_after"])


def check(run: Path, eval_file: Path | None) -> bool:
    """Print one line about a run; True if the losses agree."""
    data: dict[str, Any] = json.loads((run / "resolved_config.json").read_text(encoding="utf-8"))["data"]
    rows_file = eval_file or (EMBEDDED_EVAL if data["eval"] == "embedded:eval" else Path(data["eval"]))
    rows = [json.loads(line) for line in rows_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    expected, loss = (
        expected_loss(run),
        heldout_loss(run / "merged", rows[: data["num_eval_samples"]], data["sequence_length"]),
    )
    agrees = math.isclose(loss, expected, rel_tol=0, abs_tol=TOLERANCE)
    print(f"{'ok' if agrees else 'FAILED'}: {run / 'merged'}: held-out loss {loss:.7f}, of the run {expected:.7f}")
    return agrees


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare merged models in plain transformers with their runs.")
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of runs")
    parser.add_argument("--eval", type=Path, help="rows to measure on; default: data.eval of the run")
    arguments = parser.parse_args()
    all_agree = all([check(run, arguments.eval) for run in arguments.runs])
    loaded = sorted(name for name in sys.modules if name.partition(".")[0] == "sparse_ds")
    assert not loaded, f"this check must not use the project itself, but it imported {loaded}"
    return 0 if all_agree else 1


if __name__ == "__main__":
    sys.exit(main())
