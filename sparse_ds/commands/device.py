"""The option `--device`."""

from __future__ import annotations

import argparse

from sparse_ds.config.errors import UserError


def add_device_argument(parser: argparse.ArgumentParser, purpose: str) -> None:
    """`purpose`: what is done there."""
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help=f"where to {purpose}")


def choose_device(wanted: str) -> str:
    """ "cpu" or "cuda".

    Raises:
        UserError: a GPU is wanted where there is none.
    """
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here. Use --device cpu.")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted
