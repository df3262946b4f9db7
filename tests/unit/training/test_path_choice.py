"""From the configuration to the rule that the layers follow."""

from __future__ import annotations

from typing import Any

import pytest

from sparse_ds.config import UserError, parse_config
from sparse_ds.kernels.crossover import AUTO, PathChoice
from sparse_ds.sparse.layout import SparseLayout
from sparse_ds.training.setup import choose_path

LAYOUTS = {"q_proj": SparseLayout(8, 8, 3), "up_proj": SparseLayout(24, 8, 9)}


def choice_of(**train: Any) -> PathChoice:
    config = parse_config({"optimizer": {"learning_rate": 0.001}, "train": {"output_dir": "x", **train}})
    return choose_path(config, LAYOUTS)


def test_choices() -> None:
    assert choice_of() == AUTO
    assert choice_of(values_gradient="dense") == PathChoice("dense")
    assert choice_of(values_gradient_crossover=0.3) == PathChoice("auto", 0.3)
    by_shape = choice_of(values_gradient_crossover={"24x8": 0.2})
    assert by_shape == PathChoice("auto", None, {(24, 8): 0.2})


def test_a_shape_that_no_matrix_has_is_refused() -> None:
    with pytest.raises(UserError, match=r"got 8x24, but no target matrix .* expected some of 24x8, 8x8"):
        choice_of(values_gradient_crossover={"8x8": 0.1, "8x24": 0.2})
