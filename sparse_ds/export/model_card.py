"""The README.md of a merged model: what it is, and what its numbers are."""

from __future__ import annotations

import os
from pathlib import Path

from sparse_ds.export.adapter import StoredAdapterConfig


def merged_model_card(config: StoredAdapterConfig, *, num_deltas: int, num_hidden_deltas: int, dtype: str) -> str:
    """Markdown with the front matter of the hub.

    Args:
        config: of the adapter that was merged.
        num_deltas: trained weights.
        num_hidden_deltas: non-zero deltas that rounding left without effect.
        dtype: of the stored weights.
    """
    base = config.base
    on_hub = base.name.count("/") == 1 and not base.name.startswith((".", "~", os.sep)) and not Path(base.name).exists()
    name = base.name if on_hub else Path(base.name).name
    num_targets = sum(rows * cols for rows, cols in config.shapes.values())
    front_matter = ["---", "library_name: transformers", *([f"base_model: {name}"] if on_hub else [])]
    front_matter += ["tags:", "- sparse-fine-tuning", "- sparse_ds", "---"]
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
            *front_matter,
            "",
            f"# {name}, sparsely fine-tuned",
            "",
            f"A dense model: `{name}`{revision} and a sparse adapter, merged by sparse_ds {config.sparse_ds_version}.",
            "",
            f"- method: `{config.method}`, density {config.density:g}",
            f"- trained weights: {num_deltas:,} of {num_targets:,} in {len(config.shapes)} matrices",
            f"- trained in {base.dtype}, stored in {dtype}",
            f"- merged weight: round to {base.dtype} of (fp32 base weight + fp32 delta); "
            f"{num_hidden_deltas:,} deltas are smaller than that rounding and have no effect",
            f"- sha256 of the indices: `{config.index_hash}`",
            "",
            base_weights,
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
            'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
            "```",
            "",
            "The license of the base model applies.",
            "",
        ]
    )


def dense_model_card(base_name: str) -> str:
    """README.md of a model of which every weight was trained."""
    return (
        "---\nlibrary_name: transformers\ntags:\n- sparse_ds\n---\n\n"
        f"# Fine-tuned {base_name}\n\nEvery weight was trained (method `full` of sparse_ds, the dense baseline). Load it "
        "with `AutoModelForCausalLM.from_pretrained`.\n"
    )
