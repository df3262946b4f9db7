"""Every file in configs/ is valid, and the recipes hold the paper's numbers and the density that they claim."""

from __future__ import annotations

import re
from math import floor
from pathlib import Path

import pytest

from sparse_ds.config import RunConfig, build_deepspeed_config, load_config
from sparse_ds.config.load import CONFIGS_DIR

FILES = sorted(str(path.relative_to(CONFIGS_DIR)) for path in CONFIGS_DIR.rglob("*.json"))
# hidden size, intermediate size, query and key/value width, blocks: from each model's own config.json
ARCHITECTURES = {
    "llama2_7b": ("meta-llama/Llama-2-7b-hf", 4096, 11008, 4096, 4096, 32),
    "mistral_7b": ("mistralai/Mistral-7B-v0.1", 4096, 14336, 4096, 1024, 32),
    "llama2_70b": ("meta-llama/Llama-2-70b-hf", 8192, 28672, 8192, 1024, 80),
}
# learning rate and weight decay: table 4 of the paper, 70B those of its 13B
RATES = {
    "sft_ag": {"llama2_7b": (1e-4, 30.0), "mistral_7b": (1e-4, 30.0), "llama2_70b": (1e-5, 30.0)},
    "sft_ma": {"llama2_7b": (1e-3, 0.3), "mistral_7b": (1e-3, 0.3), "llama2_70b": (4e-4, 0.0)},
}


def shapes_OI(folder: str) -> list[tuple[int, int]]:
    """Output and input size of q, k, v, o, gate, up and down in one block."""
    _, hidden, intermediate, query, key_value, _ = ARCHITECTURES[folder]
    attention = [(query, hidden), (key_value, hidden), (key_value, hidden), (hidden, query)]
    return [*attention, (intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]


def count_lora(folder: str, lora_rank: int) -> int:
    return ARCHITECTURES[folder][-1] * sum(lora_rank * (out + into) for out, into in shapes_OI(folder))


def count_active(folder: str, density: float) -> int:
    return ARCHITECTURES[folder][-1] * sum(floor(density * out * into) for out, into in shapes_OI(folder))


def recipes(folder: str) -> dict[str, RunConfig]:
    return {path.stem: load_config(path) for path in sorted((CONFIGS_DIR / folder).glob("*.json"))}


def test_the_files_are_there() -> None:
    expected = {"zero3_sft_ag.json", "zero3_sft_ma.json", "zero3_full.json"}
    expected |= {
        f"{folder}/{method}_{base}.json" for folder in ARCHITECTURES for method in RATES for base in ("nf4", "bf16")
    }
    assert expected <= set(FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_file_is_valid_and_gives_a_deepspeed_configuration(name: str, world_size: int) -> None:
    config = load_config(name)
    assert config.warnings() == []
    assert build_deepspeed_config(config, world_size)["train_batch_size"] == config.batch_plan(world_size)[2]


def test_the_two_embedded_runs_differ_in_the_method_only() -> None:
    sparse, full = load_config("zero3_sft_ma"), load_config("zero3_full")
    assert sparse.data == full.data
    assert sparse.model.name_or_path == full.model.name_or_path == "embedded"
    assert (sparse.model.quantization, full.model.quantization) == ("nf4", "none")
    assert (sparse.method.name, full.method.name) == ("sft_ma", "full")
    for key in ("max_steps", "global_batch_size", "seed"):
        assert getattr(sparse.train, key) == getattr(full.train, key)


def test_the_two_sparse_embedded_runs_differ_in_the_method_only() -> None:
    maxima, gradients = load_config("zero3_sft_ma"), load_config("zero3_sft_ag")
    assert (maxima.method.name, gradients.method.name) == ("sft_ma", "sft_ag")
    assert maxima.method.model_copy(update={"name": "sft_ag"}) == gradients.method
    assert (maxima.model, maxima.data, maxima.export) == (gradients.model, gradients.data, gradients.export)
    assert maxima.train.model_copy(update={"output_dir": "runs/zero3_sft_ag"}) == gradients.train


@pytest.mark.parametrize("folder", ARCHITECTURES)
def test_recipes_have_the_papers_values(folder: str) -> None:
    found = recipes(folder)
    assert set(found) == {"sft_ag_nf4", "sft_ag_bf16", "sft_ma_nf4", "sft_ma_bf16"}
    for name, config in found.items():
        method, base = name.rsplit("_", 1)
        assert config.model.name_or_path == ARCHITECTURES[folder][0]
        assert config.model.quantization == ("nf4" if base == "nf4" else "none")
        assert config.model.dtype == "bfloat16"
        assert (config.train.global_batch_size, config.train.num_epochs, config.train.max_steps) == (128, 2.0, None)
        assert config.data.sequence_length == 2048
        assert (config.optimizer.schedule, config.optimizer.warmup_fraction) == ("linear", 0.03)
        assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == RATES[method][folder]
        assert (config.method.name, config.method.target_modules) == (method, "all-linear")
        assert config.method.initial_drop_fraction == 0.2
        assert (config.method.interval_steps, config.method.estimation_steps) == (20, 5)
        assert config.train.output_dir == f"runs/{folder}_{name}"


@pytest.mark.parametrize("folder", ARCHITECTURES)
@pytest.mark.parametrize("method", RATES)
def test_the_two_recipes_of_a_method_differ_in_the_base_only(folder: str, method: str) -> None:
    found = recipes(folder)
    nf4, bf16 = (found[f"{method}_{base}"].to_dict() for base in ("nf4", "bf16"))
    for sections in (nf4, bf16):
        sections["model"].pop("quantization")
        sections["train"].pop("output_dir")
    assert nf4 == bf16


@pytest.mark.parametrize("folder", ARCHITECTURES)
def test_density_trains_as_many_weights_as_lora_of_rank_64(folder: str) -> None:
    target = count_lora(folder, 64)
    for config in recipes(folder).values():
        # floor() per matrix: at most one weight per matrix is lost, and 8 digits of density are 5e-9 of all weights.
        assert abs(count_active(folder, config.method.density) - target) <= 7 * ARCHITECTURES[folder][-1]
        assert abs(count_active(folder, config.method.density) - target) / target < 2e-7


@pytest.mark.parametrize("folder", ARCHITECTURES)
def test_peft_counts_the_same_weights_of_lora(folder: str) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

    _, hidden, intermediate, _, key_value, num_blocks = ARCHITECTURES[folder]
    config_class = MistralConfig if folder.startswith("mistral") else LlamaConfig
    config = config_class(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=hidden // 128,
        num_key_value_heads=key_value // 128,
        num_hidden_layers=1,
        vocab_size=8,
        pad_token_id=0,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        lora = get_peft_model(model, LoraConfig(r=64, target_modules="all-linear"))
    assert num_blocks * lora.get_nb_trainable_parameters()[0] == count_lora(folder, 64)


def test_the_table_of_the_readme_is_right() -> None:
    text = Path(CONFIGS_DIR / "README.md").read_text(encoding="utf-8")
    rates = r" (\S+) / (\S+) \|"
    row = rf"^\| `(\w+)` \| ([0-9.]+) \| ([0-9,]+) \| ([0-9,]+) \|{rates}{rates}"
    rows = re.findall(row, text, flags=re.MULTILINE)
    assert [row[0] for row in rows] == list(ARCHITECTURES)
    for folder, density, active, lora, *rates_and_decays in rows:
        assert tuple(map(float, rates_and_decays)) == RATES["sft_ag"][folder] + RATES["sft_ma"][folder]
        assert {config.method.density for config in recipes(folder).values()} == {float(density)}
        assert count_active(folder, float(density)) == int(active.replace(",", ""))
        assert count_lora(folder, 64) == int(lora.replace(",", ""))
    density_16, active_16 = re.findall(r"method\.density=([0-9.]+)` \(([0-9,]+)\s+weights\)", text)[0]
    assert count_active("llama2_70b", float(density_16)) == count_lora("llama2_70b", 16)
    assert int(active_16.replace(",", "")) == count_lora("llama2_70b", 16)


def test_the_readme_names_every_file() -> None:
    text = Path(CONFIGS_DIR / "README.md").read_text(encoding="utf-8")
    for path in CONFIGS_DIR.rglob("*"):
        if path.is_file() and path.name != "README.md":
            assert path.name in text or path.stem in text, path
