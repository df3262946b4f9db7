"""The README.md of a merged model: what it is, and what its numbers are."""

from __future__ import annotations

from importlib.metadata import version

from sparse_ds.adapter.adapter import Adapter
from sparse_ds.adapter.peft_formats.model_card import public_name


def merged_model_card(
    adapter: Adapter, *, num_deltas: int, num_hidden_deltas: int, dtype: str, base_weights: str
) -> str:
    """Markdown with the front matter of the hub.

    Args:
        adapter: what was merged.
        num_deltas: trained weights.
        num_hidden_deltas: non-zero deltas that rounding left without effect.
        dtype: of the stored weights.
        base_weights: "dequantized" or "original": what the deltas of a training over NF4 were added to.
    """
    config = adapter.config
    base = config.base
    name, on_hub = public_name(base.name)
    num_targets = sum(rows * cols for rows, cols in config.shapes.values())
    if base.quantization == "nf4":
        double = " with double quantization" if base.double_quantization else ""
        what = (
            "their untrained weights here are the dequantized ones, as in training, not the original ones."
            if base_weights == "dequantized"
            else "here the changes are added to the original weights, so this is not quite the model that was trained. "
            "`merge_report.json` tells how far it is from it."
        )
        explained = f"The target matrices were trained over a 4-bit NF4 base{double} (blocks of 64): {what}"
    else:
        explained = "All other weights of the target matrices are those of the base model."
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
            explained,
            "",
            "```python",
            f"from transformers import {_model_class(config.task)}, AutoTokenizer",
            "",
            f'model = {_model_class(config.task)}.from_pretrained("path/to/this/folder")',
            'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
            "```",
            "",
            *([adapter.model_card_section, ""] if adapter.model_card_section else []),
            "The license of the base model applies.",
            "",
        ]
    )


def dense_model_card(base_name: str, *, task: str = "causal_lm") -> str:
    """README.md of a model of which every weight was trained."""
    name, on_hub = public_name(base_name)
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


def _front_matter(hub_base: str | None) -> list[str]:
    base_model = [] if hub_base is None else [f"base_model: {hub_base}"]
    return ["---", "library_name: transformers", *base_model, "tags:", "- sparse_ds", "---"]
