"""Liger's kernels in a model: in Triton's interpreter here, on a card where there is one."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from sparse_ds.config import RunConfig
from sparse_ds.config.errors import UserError
from sparse_ds.model.liger_pieces import liger_pieces
from sparse_ds.model.pieces import install_pieces
from sparse_ds.training.setup import find_pieces

HAS_LIGER = importlib.util.find_spec("liger_kernel") is not None
needs_liger = pytest.mark.skipif(not HAS_LIGER, reason="the package liger-kernel is not installed")
CPU = torch.device("cpu")


@needs_liger
@pytest.mark.slow
def test_the_same_loss_and_gradients_in_the_interpreter() -> None:
    """In a process of its own: Triton asks for its interpreter when it is imported."""
    program = Path(__file__).with_name("interpreted_liger.py")
    ended = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    differences = json.loads(ended.stdout.splitlines()[-1])
    assert len(differences) == 3
    # fp32: sums of some dozen terms in another order.
    assert max(differences.values()) < 1e-5, differences


def settings(**sections: dict[str, object]) -> RunConfig:
    return RunConfig.model_validate(
        {"optimizer": {"learning_rate": 0.1}, "train": {"output_dir": "unused"}, **sections}
    )


def test_no_gpu() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, hidden_size=32, intermediate_size=32, vocab_size=9))
    with pytest.raises(UserError, match=r"model\.liger_kernels: got true, but these kernels need a GPU"):
        find_pieces(settings(model={"liger_kernels": True}), model, CPU)


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"model": {"liger_kernels": True}}, r"model\.liger_kernels"),
        ({"train": {"output_dir": "unused", "compile": True}}, r"train\.compile"),
    ],
)
def test_encoders_are_refused(sections: dict[str, dict[str, object]], field: str) -> None:
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig(num_hidden_layers=1, hidden_size=24, vocab_size=9))
    with pytest.raises(UserError, match=rf"{field}: got true, but bert models have other norms"):
        find_pieces(settings(**sections), model, torch.device("cuda"))


@pytest.mark.skipif(HAS_LIGER, reason="the package liger-kernel is installed")
def test_the_package_is_missing() -> None:
    with pytest.raises(UserError, match=r"the package liger-kernel cannot be used here .*pip install liger-kernel"):
        liger_pieces()


@needs_liger
@pytest.mark.gpu
def test_on_a_card() -> None:
    """bf16 against fp32 on the same card: the error is about that of transformers' own modules."""
    config = LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    exact = LlamaForCausalLM(config).cuda().train()
    ids = torch.randint(0, 1000, (2, 130), device="cuda")

    def gradient(model: LlamaForCausalLM) -> torch.Tensor:
        loss = model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(300, device="cuda")).loss
        loss.backward()
        return model.model.layers[0].mlp.up_proj.weight.grad.float()

    eager, faster = (LlamaForCausalLM(config).cuda().bfloat16().train() for _ in range(2))
    for each in (eager, faster):
        each.load_state_dict(exact.state_dict())
    expected = gradient(exact)
    error = (gradient(eager) - expected).norm()
    install_pieces(faster, liger_pieces())
    assert (gradient(faster) - expected).norm() < 1.5 * error
