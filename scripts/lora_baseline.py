"""peft's LoRA on the data, batches, schedule and base of a sparse run: the baseline of scripts/compare_methods.py.

    python scripts/lora_baseline.py --model FOLDER --train train.txt --heldout heldout.txt --learning-rate 3e-3 ...

Plain torch, AdamW, one process. The base is bf16 with NF4-quantized target weights (dequantized again: the same numbers
as a sparse run multiplies with). The rank is the one whose number of trained weights is nearest to that of a sparse run
of the given density. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

from sparse_ds.data import CausalCollator, build_dataset
from sparse_ds.training.global_order import GlobalOrderSampler

WARMUP_FRACTION = 0.03
MAX_GRAD_NORM = 1.0


def main() -> None:
    arguments = make_parser(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = with_lora(arguments.model, arguments.density)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options: dict[str, Any] = {"data_format": "text", "sequence_length": arguments.sequence_length}
    train = build_dataset(arguments.train, tokenizer, **options).dataset
    heldout = build_dataset(arguments.heldout, tokenizer, **options).dataset
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    collate = CausalCollator(pad)
    loss_before = heldout_loss(model, heldout, collate, arguments.batch)
    optimizer = torch.optim.AdamW(trained, lr=arguments.learning_rate, weight_decay=0.0)
    num_warmup = math.ceil(WARMUP_FRACTION * arguments.steps)
    schedule = get_linear_schedule_with_warmup(optimizer, num_warmup, arguments.steps)
    for rows in batches(train, arguments.batch, arguments.steps, arguments.seed):
        model(**collate(rows)).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    loss_after = heldout_loss(model, heldout, collate, arguments.batch)
    print(
        json.dumps(
            {
                "num_trained_weights": sum(parameter.numel() for parameter in trained),
                "heldout_loss_before": loss_before,
                "heldout_loss_after": loss_after,
            }
        )
    )


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Options of both LoRA baselines."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--density", type=float, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--sequence-length", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    return parser


def with_lora(folder: Path, density: float) -> Any:
    """The model with adapters (fp32) on every linear layer inside its blocks."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    targets = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }
    for module in targets.values():
        packed, state = bnb.quantize_4bit(module.weight.data.contiguous(), blocksize=64, quant_type="nf4")
        module.weight.data = bnb.dequantize_4bit(packed, state)
    num_active = sum(math.floor(density * module.weight.numel()) for module in targets.values())
    lora_rank = round(num_active / sum(module.in_features + module.out_features for module in targets.values()))
    names = sorted({name.rsplit(".", 1)[-1] for name in targets})
    lora = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, lora_dropout=0.0, target_modules=names)
    model = get_peft_model(model, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def batches(train: Any, batch: int, steps: int, seed: int) -> Any:
    """The rows of every step, in the order of a sparse run with the same global batch."""
    order = GlobalOrderSampler(len(train), batch, seed)
    waiting: list[int] = []
    epoch = 0
    for _ in range(steps):
        if len(waiting) < batch:
            order.set_epoch(epoch)
            epoch += 1
            waiting = list(order)
        chosen, waiting = waiting[:batch], waiting[batch:]
        yield [train[index] for index in chosen]


@torch.no_grad()
def heldout_loss(model: Any, dataset: Any, collate: Any, batch: int) -> float:
    """Mean loss per token."""
    total, count = 0.0, 0
    model.eval()
    for first in range(0, len(dataset), batch):
        inputs = collate([dataset[index] for index in range(first, min(first + batch, len(dataset)))])
        targets: Tensor = inputs.pop("labels")[:, 1:]
        logits = model(**inputs).logits[:, :-1].float()
        total += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        count += int((targets != -100).sum())
    model.train()
    return total / count


if __name__ == "__main__":
    main()
