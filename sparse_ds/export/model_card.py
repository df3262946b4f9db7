"""The README.md of a merged model: what it is, and what its numbers are."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

from sparse_ds.adapter.adapter import Adapter


def merged_model_card(adapter: Adapter, *, num_deltas: int, num_hidden_deltas: int, dtype: str) -> str:
    """Markdown with the front matter of the hub.

    Args:
        adapter: what was merged.
        num_deltas: trained weights.
        num_hidden_deltas: non-zero deltas that rounding left without effect.
        dtype: of the stored weights.
    """
    config = adapter.config
    base = config.base
    name, on_hub = _public_name(base.name)
    num_targets = sum(rows * cols for rows, cols in config.shapes.values())
    if base.quantization == "nf4":
        double = " with double quantization" if base.double_quantization else ""
        base_weights = (
            f"The target matrices were trained over a 4-bit NF4 base{double} (blocks of 64): their untrained weights "
            "here are the dequantized ones, as in training, not the original ones."
        )
    else:
        base_weights = "All other weights of the target matrices are those of the base model."
    revision = f" (revision `{base.revision}`)" if base.revision else ""
    return "\n".join(
        [
            *_front_matter(name if on_hub else None),
            "",
            f"# {name}, sparsely fine-tuned",
            "",
            f"A dense model: `{name}`{revision} and a sparse adapter, merged by sparse_ds {version('sparse-ds')}.",
            "",
            f"- method: `{config.method}`, density {config.density:g}",
            f"- trained weights: {num_deltas:,} of {num_targets:,} in {len(config.shapes)} matrices",
            f"- trained in {base.dtype}, stored in {dtype}",
            f"- merged weight: round to {base.dtype} of (fp32 base weight + fp32 delta); "
            f"{num_hidden_deltas:,} deltas are smaller than that rounding and have no effect",
            f"- sha256 of the indices: `{adapter.index_hash}`",
            *(
                []
                if config.labels is None
                else [f"- labels: {', '.join(config.labels)}; their head trained as a whole"]
            ),
            "",
            base_weights,
            "",
            "```python",
            f"from transformers import {_model_class(config.task)}, AutoTokenizer",
            "",
            f'model = {_model_class(config.task)}.from_pretrained("path/to/this/folder")',
            'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
            "```",
            "",
            "The license of the base model applies.",
            "",
        ]
    )


def dense_model_card(base_name: str, *, task: str = "causal_lm") -> str:
    """README.md of a model of which every weight was trained."""
    name, on_hub = _public_name(base_name)
    return "\n".join(
        [
            *_front_matter(name if on_hub else None),
            "",
            f"# {name}, fine-tuned",
            "",
            "Every weight was trained (method `full` of sparse_ds, the dense baseline).",
            f"Load it with `{_model_class(task)}.from_pretrained`. The license of the base model applies.",
            "",
        ]
    )


def _model_class(task: str) -> str:
    return "AutoModelForCausalLM" if task == "causal_lm" else "AutoModelForSequenceClassification"


def _public_name(base_name: str) -> tuple[str, bool]:
    """(name to show, whether it is a hub name). Of a local path only the last part is shown."""
    is_path = base_name.count("/") != 1 or base_name.startswith((".", "~", os.sep)) or Path(base_name).exists()
    return (Path(base_name).name, False) if is_path else (base_name, True)


def _front_matter(hub_base: str | None) -> list[str]:
    base_model = [] if hub_base is None else [f"base_model: {hub_base}"]
    return ["---", "library_name: transformers", *base_model, "tags:", "- sparse_ds", "---"]
