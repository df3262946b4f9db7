"""peft's LoRA on the data, batches, schedule and head of a sparse classification: the baseline of compare_classifiers.

    python scripts/lora_classifier.py --model FOLDER --train train.jsonl --heldout heldout.jsonl --learning-rate 3e-3

Plain torch, AdamW, one process, fp32. The head starts with the numbers of the sparse run and trains as a whole in both.
The rank is the one whose number of trained weights is nearest to that of a sparse run of the given density. Prints one
JSON line.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lora_baseline import MAX_GRAD_NORM, WARMUP_FRACTION, batches, make_parser
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

from sparse_ds.config.schema import DataConfig
from sparse_ds.data import build_datasets
from sparse_ds.model.classification_head import NORMAL_SCALE, normal_numbers
from sparse_ds.training.classification_scores import LabelCounts, scores_of


def main() -> None:
    arguments = make_parser(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    settings = DataConfig(
        train=str(arguments.train), eval=str(arguments.heldout), sequence_length=arguments.sequence_length
    )
    data = build_datasets(settings, tokenizer, task="sequence_classification")
    model = with_lora(arguments.model, arguments.density, data, arguments.seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arguments.learning_rate, weight_decay=0.0)
    num_warmup = math.ceil(WARMUP_FRACTION * arguments.steps)
    schedule = get_linear_schedule_with_warmup(optimizer, num_warmup, arguments.steps)
    for rows in batches(data.train, arguments.batch, arguments.steps, arguments.seed):
        batch = data.collator(rows)
        labels = batch.pop("labels")
        F.cross_entropy(model(**batch).logits, labels).backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    loss, scores = evaluate(model, data, arguments.batch)
    print(
        json.dumps(
            {
                "num_trained_weights": sum(parameter.numel() for parameter in trained),
                "heldout_loss_after": loss,
                "heldout_scores_after": scores,
            }
        )
    )


def with_lora(folder: Path, density: float, data: Any, seed: int) -> Any:
    """The classifier with adapters on every linear layer inside its blocks, and a head that trains."""
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(data.train_data.labels), pad_token_id=data.collator.pad_token_id, dtype=torch.float32
    )
    scale = NORMAL_SCALE / math.sqrt(model.config.hidden_size)
    model.score.weight.data = normal_numbers(tuple(model.score.weight.shape), scale, seed, "score.weight")
    targets = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }
    num_active = sum(math.floor(density * module.weight.numel()) for module in targets.values())
    lora_rank = round(num_active / sum(module.in_features + module.out_features for module in targets.values()))
    names = sorted({name.rsplit(".", 1)[-1] for name in targets})
    lora = LoraConfig(
        r=lora_rank,
        lora_alpha=2 * lora_rank,
        lora_dropout=0.0,
        target_modules=names,
        modules_to_save=["score"],
        task_type="SEQ_CLS",
    )
    return get_peft_model(model, lora)


@torch.no_grad()
def evaluate(model: Any, data: Any, batch_size: int) -> tuple[float, dict[str, float]]:
    """Mean loss per sample, and the scores of all samples."""
    model.eval()
    total, counts = 0.0, LabelCounts(len(data.train_data.labels))
    for first in range(0, len(data.eval), batch_size):
        batch = data.collator([data.eval[i] for i in range(first, min(first + batch_size, len(data.eval)))])
        labels: Tensor = batch.pop("labels")
        logits = model(**batch).logits
        total += float(F.cross_entropy(logits, labels, reduction="sum"))
        counts.add(logits, labels)
    return total / len(data.eval), scores_of(counts.numbers())


if __name__ == "__main__":
    main()
