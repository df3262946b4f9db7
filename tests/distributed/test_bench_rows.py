"""The rows of the benchmarks are what they claim to be: the same model, and the steps of the real methods."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

SCRIPTS = str(Path(__file__).resolve().parents[2] / "scripts")
DENSITY = 0.02


@pytest.fixture(autouse=True)
def _scripts_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)


def test_all_rows_step_on_the_same_model_and_the_methods_are_the_real_ones() -> None:
    (found,) = run_ranks(1, _step_all_rows)
    losses = found["losses"]
    assert set(losses) >= {"floor", "sparta", "sft_ag", "sft_ma", "lora_0", "dora", "shira", "supertuning", "full"}
    for name, loss in losses.items():
        # All deltas and adapters begin at 0; dropout of the adapter's input changes nothing then.
        assert loss == pytest.approx(losses["floor"], rel=1e-5), name
    assert found["base_is_untouched"]
    # AdamW's weights there are w + value in fp32: near 0.1 one unit in the last place is 7.5e-9, a value about 2e-5.
    assert found["largest_difference_from_adamw"] < 1e-8
    assert found["num_estimation_steps"] == 2
    assert found["num_grown"] > 0
    # The floor's graph begins behind q, k and v of the first block, so their input has no gradient, but those of all
    # other matrices are computed: as many products as of the dense model, less the weights' gradients and three.
    assert found["floor_products"] == 2 * 7 * 2 - 3 + 2


def test_nf4_rows_see_the_same_weights() -> None:
    (found,) = run_ranks(1, _nf4_losses)
    assert set(found) == {"floor", "sparta", "sparta_compiled", "sft_ag", "sft_ma", "lora_0", "lora_0.1", "dora"}
    for name, loss in found.items():
        assert loss == pytest.approx(found["floor"], rel=2e-3), name


def test_the_cpu_allocator_is_read_to_the_byte() -> None:
    from bench_memory import watch_cpu

    kept = []

    def action() -> None:
        kept.append(torch.empty(1000, 1000))
        gone = torch.empty(2_000_000, dtype=torch.uint8)
        gone.fill_(1)
        del gone
        kept.append(torch.empty(500, 1000))

    held, highest = watch_cpu(action)
    assert held == 6_000_000
    assert highest == 6_000_000
    assert watch_cpu(kept.clear) == (-6_000_000, 0)


def test_an_event_is_shared_out_over_the_steps() -> None:
    from interleaved import Timed, table

    # Exact in binary, so that the ratios are too.
    parts = {"step": [8.0], "first estimation step": [40.0], "estimation step": [16.0], "event": [96.0]}
    timed = [
        Timed("floor", None, 0, {"step": [8.0]}, {}),
        Timed("sft_ag", 0.01, 5, parts, {}),
        Timed("lora_0.1", 0.01, 5, {"step": [4.0]}, {}),
    ]
    # (40 - 8) + 4 * (16 - 8) + 96 = 160 over 20 steps
    assert timed[1].whole_step_ms() == [16.0]
    assert "| 1 % | SFT-AG, all included | 5 | 16.0 | 2.00 | 4.00 | 16.0 to 16.0 |" in table(timed)


def test_short_models_keep_the_share_of_the_head() -> None:
    from bench_base import SHAPES, shape_of

    short, whole = shape_of("llama-2-7b", 4), SHAPES["llama-2-7b"]
    assert short.vocab / short.layers == pytest.approx(whole.vocab / whole.layers, rel=0.02)
    assert short._replace(layers=whole.layers, vocab=whole.vocab) == whole
    assert shape_of("llama-2-7b", None) == whole


def _base_and_batch(*, dtype: torch.dtype = torch.float32, nf4: bool = False) -> tuple[Any, dict[str, Any]]:
    from bench_base import random_base, random_batch, shape_of

    cpu = torch.device("cpu")
    shape = shape_of("tiny", 2)
    return random_base(shape, dtype, nf4=nf4, device=cpu), random_batch(shape, 2, 16, cpu)


def _step_all_rows() -> dict[str, Any]:
    sys.path.insert(0, SCRIPTS)
    from bench_rows import EVENT, LEARNING_RATE, ROWS, make_row
    from torch.utils._python_dispatch import TorchDispatchMode

    base, batch = _base_and_batch()
    before = {name: roles["weight"].clone() for name, roles in base.tensors.items()}
    rows = {name: make_row(name, base, DENSITY, checkpointing=name == "sft_ma") for name in ROWS}
    losses = {name: float(row.step(batch)) for name, row in rows.items()}

    # SpaRTA after two steps, beside torch's AdamW on the whole matrices of a plain model.
    model = base.empty_model(checkpointing=False)
    base.fill(model)
    sparta = rows["sparta"]
    masters = {name: before[f"{name}.weight"].clone().requires_grad_() for name in sparta.layers}
    adamw = torch.optim.AdamW(masters.values(), lr=LEARNING_RATE, weight_decay=0.0)
    chosen = {name: layer.active_indices.long() for name, layer in sparta.layers.items()}
    for _ in range(2):
        for name, master in masters.items():
            weight = before[f"{name}.weight"].clone()
            weight.view(-1)[chosen[name]] = master.detach().view(-1)[chosen[name]]
            model.get_submodule(name).weight = torch.nn.Parameter(weight)
        model(**batch).loss.backward()
        for name, master in masters.items():
            master.grad = model.get_submodule(name).weight.grad
        adamw.step()
    sparta.step(batch)
    differences = [
        (layer.values - (masters[name] - before[f"{name}.weight"]).view(-1)[chosen[name]]).abs().max()
        for name, layer in sparta.layers.items()
    ]

    class Products(TorchDispatchMode):
        num_seen = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Products.num_seen += function._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
            return function(*args, **(kwargs or {}))

    with Products():
        rows["floor"].step(batch)
    num_estimation_steps, old_indices = 0, {}
    for name in ("sft_ma", "sft_ag"):
        old_indices = {layer_name: layer.active_indices.clone() for layer_name, layer in rows[name].layers.items()}
        for part, action in rows[name].measured(batch).items():
            if part == EVENT and name == "sft_ag":
                num_estimation_steps = rows[name].estimation.num_counted_steps
            action()
    num_grown = sum(
        int((~torch.isin(layer.active_indices, old_indices[name])).sum())
        for name, layer in rows["sft_ag"].layers.items()
    )
    return {
        "losses": losses,
        "base_is_untouched": all(torch.equal(base.tensors[name]["weight"], old) for name, old in before.items()),
        "largest_difference_from_adamw": float(max(differences).detach()),
        "num_estimation_steps": num_estimation_steps,
        "num_grown": num_grown,
        "floor_products": Products.num_seen,
    }


def _nf4_losses() -> dict[str, float]:
    sys.path.insert(0, SCRIPTS)
    from bench_rows import NOT_IN_NF4, ROWS, make_row

    base, batch = _base_and_batch(dtype=torch.bfloat16, nf4=True)
    losses = {}
    for name in ROWS:
        if name not in NOT_IN_NF4:
            losses[name] = float(make_row(name, base, DENSITY, checkpointing=False).step(batch))
    assert all(math.isfinite(loss) for loss in losses.values())
    return losses
