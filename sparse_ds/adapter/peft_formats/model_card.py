"""The README.md of an adapter in PEFT's format: what it is, and the lines of Python that load it."""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path

from sparse_ds.adapter.adapter import Adapter


def peft_model_card(adapter: Adapter, *, peft_type: str, num_deltas: int, index_hash: str, notes: list[str]) -> str:
    """Markdown with the front matter of the hub.

    Args:
        adapter: what was written.
        peft_type: "SUPERTUNING" or "SHIRA".
        num_deltas: trained weights, without what fills up.
        index_hash: of the indices.
        notes: sentences about its numbers.
    """
    config = adapter.config
    name, on_hub = public_name(config.base.name)
    revision = f" (revision `{config.base.revision}`)" if config.base.revision else ""
    num_targets = sum(rows * cols for rows, cols in config.shapes.values())
    return "\n".join(
        [
            "---",
            "library_name: peft",
            *([f"base_model: {name}"] if on_hub else []),
            "tags:",
            "- sparse_ds",
            "---",
            "",
            f"# {name}, a sparse adapter",
            "",
            f"For `{name}`{revision}, written by sparse_ds {version('sparse-ds')} as a `{peft_type}` adapter of PEFT.",
            "",
            f"- method: `{config.method}`, density {config.density:g}",
            f"- trained weights: {num_deltas:,} of {num_targets:,} in {len(config.shapes)} matrices",
            f"- trained over a base in {_base_form(adapter)}",
            f"- sha256 of the indices: `{index_hash}`",
            *([] if config.labels is None else [f"- labels: {', '.join(config.labels)}; their head is inside"]),
            "",
            *notes,
            "",
            "```python",
            *_loading_code(adapter, name, over_4bit=peft_type == "SHIRA" and config.base.quantization == "nf4"),
            "```",
            "",
            "`sparse_ds.json` is for sparse_ds, which reads this folder back without loss; PEFT does not need it.",
            "The license of the base model applies.",
            "",
        ]
    )


def public_name(base_name: str) -> tuple[str, bool]:
    """(name to show, whether it is a hub name). Of a local path only the last part is shown."""
    is_path = base_name.count("/") != 1 or base_name.startswith((".", "~", os.sep)) or Path(base_name).exists()
    return (Path(base_name).name, False) if is_path else (base_name, True)


def _base_form(adapter: Adapter) -> str:
    base = adapter.config.base
    double = " with double quantization" if base.double_quantization else ""
    return base.dtype if base.quantization == "none" else f"4-bit NF4{double} (blocks of 64), computed in {base.dtype}"


def _loading_code(adapter: Adapter, name: str, *, over_4bit: bool) -> list[str]:
    config, base = adapter.config, adapter.config.base
    is_classifier = config.task == "sequence_classification"
    model_class = "AutoModelForSequenceClassification" if is_classifier else "AutoModelForCausalLM"
    arguments = [f"dtype=torch.{base.dtype}"]
    if base.revision:
        arguments.append(f'revision="{base.revision}"')
    if config.labels is not None:
        labels = json.dumps(config.labels, ensure_ascii=False)
        arguments += [f"num_labels={len(config.labels)}", f"id2label=dict(enumerate({labels}))"]
        arguments.append(f"pad_token_id={config.pad_token_id}")
    lines = ["import torch", "from peft import PeftModel"]
    if over_4bit:
        lines = [
            "import json",
            "",
            *lines,
            f"from transformers import {model_class}, BitsAndBytesConfig",
            "",
            "# In training the matrices of the adapter were in 4 bits, and no others.",
            'with open("path/to/this/folder/sparse_ds.json", encoding="utf-8") as file:',
            '    quantized = "|".join(json.load(file)["config"]["shapes"])',
            "nf4 = BitsAndBytesConfig(",
            '    load_in_4bit=True, bnb_4bit_quant_type="nf4",',
            f"    bnb_4bit_use_double_quant={base.double_quantization}, bnb_4bit_compute_dtype=torch.{base.dtype},",
            '    llm_int8_skip_modules=[f"(?!(?:{quantized})$).*"],',
            ")",
        ]
        arguments.append("quantization_config=nf4")
    else:
        lines += [f"from transformers import {model_class}", ""]
    return [
        *lines,
        f"base = {model_class}.from_pretrained(",
        f'    "{name if public_name(base.name)[1] else f"path/to/{name}"}",',
        *[f"    {argument}," for argument in arguments],
        ")",
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
    ]
