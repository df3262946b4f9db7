"""A run goes on from its own checkpoints only, and says what differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_checkpoints import IDENTITY

from sparse_ds.checkpoint.identity import check_identity
from sparse_ds.config.errors import UserError


def test_the_same_run_may_go_on(tmp_path: Path) -> None:
    check_identity(IDENTITY, json.loads(json.dumps(IDENTITY)), tmp_path)


def test_every_difference_has_a_line(tmp_path: Path) -> None:
    current = {
        "seed": 1,
        "base": {"dtype": "bfloat16"},
        "momentum": 0.5,
        "active_weights": {"q_proj": 7, "k_proj": 4, **{f"layer_{number}": number for number in range(7)}},
    }
    with pytest.raises(UserError) as raised:
        check_identity(IDENTITY, current, tmp_path / "checkpoint-5")
    assert str(raised.value) == (
        f"checkpoint.resume: {tmp_path}/checkpoint-5 belongs to another run (checkpoint | this run):\n"
        "  active_weights.k_proj: 3 | 4\n"
        "  active_weights.layer_0: None | 0\n"
        "  active_weights.layer_1: None | 1\n"
        "  active_weights.layer_2: None | 2\n"
        "  active_weights.layer_3: None | 3\n"
        "  active_weights: 3 more\n"
        "  momentum: None | 0.5\n"
        "  seed: 0 | 1\n"
        "Use the configuration that wrote it, or start anew in another folder."
    )
