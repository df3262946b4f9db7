"""Sparse fine-tuning beside full fine-tuning and peft's LoRA, on one model and one text.

    python scripts/compare_methods.py --model MODEL_FOLDER --text TEXT_FILE --output runs/compare

The first 85 % of the text's lines train, the rest is held out. `sft_ma` and `full` run through launcher/train.py on two
ZeRO-3 ranks; LoRA runs in this process (plain torch, peft) over the same base weights (dequantized NF4), with the rank
whose number of trained weights is nearest to `sft_ma`'s, on the same batches in the same order. Every method is run
with each learning rate of its list and the best held-out loss is reported, with all others listed.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LEARNING_RATES = {"sft_ma": (3e-3, 1e-2, 3e-2), "full": (5e-4, 1e-3, 2e-3), "lora": (1e-3, 3e-3, 1e-2)}


@dataclass(frozen=True)
class Result:
    """One run."""

    method: str
    learning_rate: float
    num_trained_weights: int
    loss_before: float
    loss_after: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a Llama checkpoint")
    parser.add_argument("--text", type=Path, required=True, help="plain text")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8, help="samples a step over both ranks")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=list(LEARNING_RATES), default=list(LEARNING_RATES))
    arguments = parser.parse_args()
    train_file, heldout_file = split_text(arguments.text, arguments.output)
    results = []
    for method in arguments.methods:
        for learning_rate in LEARNING_RATES[method]:
            run = run_lora if method == "lora" else run_launcher
            results.append(run(arguments, method, learning_rate, train_file, heldout_file))
            print(results[-1], flush=True)
    print(table(results, arguments.methods))


def split_text(text: Path, output: Path) -> tuple[Path, Path]:
    """First 85 % of the lines to train.txt, the rest to heldout.txt."""
    output.mkdir(parents=True, exist_ok=True)
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    cut = int(len(lines) * 0.85)
    train_file, heldout_file = output / "train.txt", output / "heldout.txt"
    train_file.write_text("".join(lines[:cut]), encoding="utf-8")
    heldout_file.write_text("".join(lines[cut:]), encoding="utf-8")
    return train_file, heldout_file


def run_launcher(
    arguments: argparse.Namespace, method: str, learning_rate: float, train_file: Path, heldout_file: Path
) -> Result:
    """One run of launcher/train.py on two ranks."""
    folder = arguments.output / f"{method}_lr{learning_rate:g}"
    overrides = {
        "model.name_or_path": arguments.model,
        "data.train": train_file,
        "data.eval": heldout_file,
        "data.format": "text",
        "data.sequence_length": arguments.sequence_length,
        "optimizer.learning_rate": learning_rate,
        "train.output_dir": folder,
        "train.overwrite": "true",
        "train.max_steps": arguments.steps,
        "train.micro_batch_size": arguments.batch // 2,
        "train.gradient_accumulation_steps": 1,
        "train.seed": arguments.seed,
        "monitor.num_sample_prompts": 0,
        "export.merged": "false",
    }
    if method == "sft_ma":
        overrides["method.density"] = arguments.density
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2"]
    command = [*launcher, str(ROOT / "launcher/train.py"), "--config", f"zero3_{method}"]
    for key, value in overrides.items():
        command += ["--set", f"{key}={value}"]
    with (arguments.output / f"{folder.name}.log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    summary = json.loads(lines[-1])
    return Result(
        method,
        learning_rate,
        summary["num_trained_weights"],
        summary["heldout_loss_before"],
        summary["heldout_loss_after"],
    )


def run_lora(
    arguments: argparse.Namespace, method: str, learning_rate: float, train_file: Path, heldout_file: Path
) -> Result:
    """peft's LoRA with AdamW on the same samples a step, warm-up and schedule."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

    from sparse_ds.data import CausalCollator, build_dataset
    from sparse_ds.training.global_order import GlobalOrderSampler

    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    targets = [module for name, module in model.named_modules() if is_target(name, module)]
    for module in targets:
        module.weight.data = dequantized_nf4(module.weight.data)
    num_active = sum(math.floor(arguments.density * module.weight.numel()) for module in targets)
    lora_rank = round(num_active / sum(module.in_features + module.out_features for module in targets))
    names = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if is_target(name, module)})
    model = get_peft_model(
        model, LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, lora_dropout=0.0, target_modules=names)
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(0.03 * arguments.steps), arguments.steps)
    options = {"data_format": "text", "sequence_length": arguments.sequence_length}
    train = build_dataset(train_file, tokenizer, **options).dataset
    heldout = build_dataset(heldout_file, tokenizer, **options).dataset
    collate = CausalCollator(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
    loss_before = heldout_loss(model, heldout, collate, arguments.batch)
    order = GlobalOrderSampler(len(train), arguments.batch, arguments.seed)
    indices: list[int] = []
    for step in range(arguments.steps):
        if len(indices) < arguments.batch:
            order.set_epoch(step * arguments.batch // len(order))
            indices = list(order)
        chosen, indices = indices[: arguments.batch], indices[arguments.batch :]
        batch = collate([train[i] for i in chosen])
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    loss_after = heldout_loss(model, heldout, collate, arguments.batch)
    return Result(method, learning_rate, sum(p.numel() for p in trained), loss_before, loss_after)


def is_target(name: str, module: Any) -> bool:
    """Linear layers inside the transformer blocks."""
    import torch

    return isinstance(module, torch.nn.Linear) and ".layers." in name


def dequantized_nf4(weight: Any) -> Any:
    """The weight after a round trip through NF4."""
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(weight.contiguous(), blocksize=64, quant_type="nf4")
    return bnb.dequantize_4bit(packed, state)


def heldout_loss(model: Any, dataset: Any, collate: Any, batch_size: int) -> float:
    """Mean loss per token."""
    import torch
    import torch.nn.functional as F

    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for first in range(0, len(dataset), batch_size):
            rows = [dataset[i] for i in range(first, min(first + batch_size, len(dataset)))]
            batch = collate(rows)
            targets = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1].float()
            total += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
            count += int((targets != -100).sum())
    model.train()
    return total / count


def table(results: list[Result], methods: list[str]) -> str:
    """Markdown: the best learning rate of each method, and every run."""
    lines = [
        "| method | trained weights | best lr | held-out before | after | all (lr: after) |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for method in methods:
        runs = [result for result in results if result.method == method]
        best = min(runs, key=lambda result: result.loss_after)
        others = ", ".join(f"{result.learning_rate:g}: {result.loss_after:.3f}" for result in runs)
        lines.append(
            f"| {method} | {best.num_trained_weights:,} | {best.learning_rate:g} | {best.loss_before:.3f} | "
            f"{best.loss_after:.3f} | {others} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
