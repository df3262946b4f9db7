"""SpaRTA: a fixed random set of weights, trained by AdamW; no event ever changes it.

Reference: SpaRTA: Sparsity-constrained randomised fine-tuning (Rios et al. 2025, arXiv 2502.15975).
"""

from __future__ import annotations

FACTS = {
    "summary": "a fixed random set of weights (Rios et al. 2025, arXiv 2502.15975), AdamW",
    "optimizer": "adamw",
    "events": "none",
    "keys": ("sampling", "train_biases", "train_norms"),
}
