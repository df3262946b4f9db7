"""Which layers a pattern means."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig

from sparse_ds.config.errors import UserError
from sparse_ds.model.targets import find_targets

SIZES = {"vocab_size": 20, "hidden_size": 12, "intermediate_size": 18, "num_attention_heads": 2}
KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def model_of(config: PretrainedConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return model_of(LlamaConfig(**SIZES, num_hidden_layers=12))


@pytest.mark.parametrize("config_class", [LlamaConfig, MistralConfig])
def test_all_linear_is_every_linear_layer_of_the_blocks(config_class: type[PretrainedConfig]) -> None:
    found = find_targets(model_of(config_class(**SIZES, num_hidden_layers=2, num_key_value_heads=1)), "all-linear")
    assert len(found) == len(set(found)) == 14
    assert {name.rsplit(".", 1)[-1] for name in found} == set(KINDS)
    assert not any("lm_head" in name or "embed" in name for name in found)
    assert found[0].startswith("model.layers.0.") and found[-1].startswith("model.layers.1.")


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["q_proj"], [f"model.layers.{i}.self_attn.q_proj" for i in range(12)]),
        ("mlp.down_proj", [f"model.layers.{i}.mlp.down_proj" for i in range(12)]),
        # A name is no prefix: layer 1, not 10 and 11.
        (["layers.1.mlp.up_proj"], ["model.layers.1.mlp.up_proj"]),
        (["model.layers.11.mlp.up_proj"], ["model.layers.11.mlp.up_proj"]),
        (
            [r"model\.layers\.[02]\.self_attn\.[kv]_proj"],
            [f"model.layers.{i}.self_attn.{k}_proj" for i in (0, 2) for k in "kv"],
        ),
        # In the order of the model, each once, however they are asked for.
        (
            ["layers.3.self_attn.v_proj", "layers.3.self_attn.k_proj", r".*\.3\.self_attn\.v_proj"],
            [f"model.layers.3.self_attn.{k}_proj" for k in "kv"],
        ),
    ],
)
def test_patterns(model: torch.nn.Module, patterns: list[str] | str, expected: list[str]) -> None:
    assert find_targets(model, patterns) == expected


@pytest.mark.parametrize("pattern", ["q_prj", "proj", "lm_head", "embed_tokens", "self_attn", "layers", "(", ""])
def test_a_pattern_that_matches_nothing_is_named(model: torch.nn.Module, pattern: str) -> None:
    with pytest.raises(UserError) as caught:
        find_targets(model, ["v_proj", pattern])
    message = str(caught.value)
    assert message.startswith(f"method.target_modules: {pattern!r} matches no linear layer of the model")
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in message
    assert message.endswith(" Did you mean 'q_proj'?") is (pattern == "q_prj")
