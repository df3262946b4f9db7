"""How far PEFT's rounding is from the trained model, and what an adapter loses on its way through PEFT.

Without arguments: random weights ~ N(0, 0.02^2) in bf16 and deltas of several sizes, as a table: the share of deltas
that bf16 hides, and the share of trained weights that differ between round(w + value), the trained weight, and
w + round(value), PEFT's supertuning.

With a base, an adapter of it and a text: the loss of the base, of the merged model (the trained one), of the adapter in
PEFT as supertuning over the 16-bit base (and of the same sums rounded once), and as shira over the base in the form of
the training; and the sizes of the folders. Runs on the CPU.

    python scripts/compare_peft.py
    python scripts/compare_peft.py --base FOLDER --adapter FOLDER --text FILE
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_ds.adapter.adapter import Adapter
from sparse_ds.adapter.opening import open_adapter
from sparse_ds.adapter.peft_formats.shira import save_shira
from sparse_ds.adapter.peft_formats.supertuning import save_supertuning
from sparse_ds.export.merged import merge_adapter

NUM_RANDOM = 4_000_000
DELTA_SCALES = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="folder or hub name of the base model")
    parser.add_argument("--adapter", help="folder of the adapter")
    parser.add_argument("--text", type=Path, help="text file; its last part is used")
    parser.add_argument("--windows", type=int, default=16, help="of 256 tokens, in one batch")
    arguments = parser.parse_args(argv)
    given = [arguments.base, arguments.adapter, arguments.text]
    if any(given) and not all(given):
        parser.error("give --base, --adapter and --text together")
    if all(given):
        compare_losses(arguments.base, open_adapter(arguments.adapter), arguments.text, arguments.windows)
    else:
        compare_random()
    return 0


def compare_random() -> None:
    generator = torch.Generator().manual_seed(0)
    weights_N = (torch.randn(NUM_RANDOM, generator=generator) * 0.02).bfloat16()
    print("| deltas ~ N(0, s^2), s | hidden by bf16 | differ in PEFT |\n|--:|--:|--:|")
    for scale in DELTA_SCALES:
        values_N = torch.randn(NUM_RANDOM, generator=generator) * scale
        trained_N = (weights_N.float() + values_N).bfloat16()
        hidden, differing = (trained_N == weights_N).double().mean(), share_of_differing(weights_N, values_N)
        print(f"| {scale:g} | {hidden:.1%} | {differing:.2%} |", flush=True)


def share_of_differing(weights_K: Tensor, values_K: Tensor) -> float:
    trained_K = (weights_K.float() + values_K).to(weights_K.dtype)
    return float((trained_K != weights_K + values_K.to(weights_K.dtype)).double().mean())


def compare_losses(base: str, adapter: Adapter, text: Path, num_windows: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(text.read_text(encoding="utf-8"))["input_ids"][-num_windows * 256 :]
    tokens = torch.tensor(ids[: len(ids) // 256 * 256]).view(-1, 256)
    dtype = getattr(torch, adapter.config.base.dtype)

    def load(folder: str | Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    def loss(model: Any) -> float:
        with torch.no_grad():
            return float(model(tokens, labels=tokens).loss)

    with tempfile.TemporaryDirectory() as work:
        supertuning = save_supertuning(adapter, Path(work, "supertuning"))
        shira = save_shira(adapter, Path(work, "shira"))
        merge_adapter(base, adapter, Path(work, "merged"), dtype=adapter.config.base.dtype)
        rows = {"base": loss(load(base)), "merged": loss(load(Path(work, "merged")))}
        if adapter.config.base.quantization == "nf4":
            settings = {"dtype": adapter.config.base.dtype, "base_weights": "original"}
            merge_adapter(base, adapter, Path(work, "original"), **settings)
            rows["merged into the 16-bit base"] = loss(load(Path(work, "original")))
        rows["supertuning over the 16-bit base"] = loss(PeftModel.from_pretrained(load(base), supertuning.folder))
        rows["shira over the base of the training"] = loss(load_by_card(shira.folder, base))
    original = load(base)
    weights = [original.get_submodule(name).weight.view(-1)[deltas.indices.long()] for name, deltas in adapter.items()]
    values = torch.cat([deltas.values for _, deltas in adapter.items()])
    print("| model | loss |\n|---|--:|")
    for name, value in rows.items():
        print(f"| {name} | {value:.6f} |")
    print(f"\n{values.numel()} deltas, median |value| {values.abs().median():.2g}; of the trained weights", end=" ")
    print(f"{share_of_differing(torch.cat(weights).detach(), values):.1%} differ between supertuning and training.")
    for name, report in (("supertuning", supertuning), ("shira", shira)):
        print(f"{name}: {report.size_bytes} bytes, {report.num_padding} entries only fill up")


def load_by_card(folder: Path, base: str) -> Any:
    """Run the lines of the model card."""
    code = (folder / "README.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    before, _, after = code.partition(".from_pretrained(\n")
    _, _, after = after.partition("\n")  # the line with the name of the base
    names: dict[str, Any] = {}
    exec(f"{before}.from_pretrained(\n{base!r},\n{after}".replace("path/to/this/folder", str(folder)), names)
    return names["model"]


if __name__ == "__main__":
    sys.exit(main())
