r"""AdamW with one age per weight: weights that grow in the middle of training get the bias correction of their own age.

For a weight w with gradient g, age a (this step included), learning rate :math:`\eta`, decoupled decay :math:`\lambda`

.. math::
    w &\leftarrow w - \eta \lambda w \\
    m &\leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
    w &\leftarrow w - \eta \frac{m / (1 - \beta_1^a)}{\sqrt{v / (1 - \beta_2^a)} + \epsilon}

`w` is a delta, so the decay pulls towards the pretrained weight. With all ages equal this is `torch.optim.AdamW`, in
the same order of operations: bit for bit on the CPU. A grown weight whose gradient was watched for n steps starts
with :math:`m = (1 - \beta_1^n) \bar g`, :math:`v = (1 - \beta_2^n) \overline{g^2}` and age n, which is what AdamW would
hold had the gradient been constant; its first step is therefore as long as that of an old weight, not longer.

With `age_warmup_steps` n the learning rate of a weight is :math:`\eta \min(1, a / n)`: a warm-up of its own for every
weight. Many grown weights that take their first step together, all in the direction of their gradient and at the full
learning rate, can throw the model back (Differs from the paper, which has no such thing; 0 turns it off).

Ages are not stored. `birth_step` is the number of applied steps at which the age was 0, and age = step - birth_step:
nothing has to be advanced, so nothing can freeze (a bfloat16 counter stops at 256). Weights born together share their
age, so what is kept of a weight is the number of its cohort (`birth_steps`), and nothing while there is only one.

The moments may be stored in 16 or 8 bits; the update itself is always fp32. Rounding them to nearest freezes v:
with beta2 = 0.999 a step moves v by 0.1 % of its distance to g^2, less than half a code step, and is rounded away.
Measured after 3000 steps of constant g^2, v divided by what it should be: mean and standard deviation

============ ========= ===================== =====================
                       bfloat16              int8, v of 1 in block
v to begin   g^2       nearest   stochastic  nearest   stochastic
============ ========= ========= =========== ========= ===========
1            0.25      3.48      1.00, 0.03  3.48      1.00, 0.06
0.01         0.5       0.26      1.00, 0.01  0.02      1.00, 0.03
0.01         0.0001    16.9      1.00, 0.10  16.7      0.99, 0.49
============ ========= ========= =========== ========= ===========

So rounding is stochastic: up with the probability of the fraction that is cut off, right on average. The random bits
are a hash of (step, flat tensor, position in it): the same on every device, however the work is cut, and after a
resume. The price is noise: with gaussian gradients v has a standard deviation of 5 % with bfloat16 and, with int8,
of 12, 18, 36 or 75 % where v is 0.25, 0.01, 1e-4 or 1e-6 of the largest in its block.

int8 is the dynamic map of bitsandbytes' 8-bit Adam (signed for m, unsigned for v), blocks of 256 with one fp32
maximum each. Differs from bitsandbytes, besides the rounding, in two codes. The signed map ends at -0.993 there, so
that the most negative m of a block shrinks at every step; here it ends at -1. And a v > 0 is never rounded to 0, which
would make the step m / eps; the smallest is 3.25e-7 of the block's maximum (gradients below 0.06 % of the block's
largest take smaller steps than in fp32).

References: Decoupled Weight Decay Regularization (Loshchilov & Hutter 2019, arXiv 1711.05101), Algorithm 2; ages:
Scaling Sparse Fine-Tuning to Large Language Models (Ansell et al. 2024, arXiv 2401.16405), section 3; 8 bits: 8-bit
Optimizers via Block-wise Quantization (Dettmers et al. 2022, arXiv 2110.02861); zeros in v: Memory Efficient
Optimizers with 4-bit States (Li et al. 2023, arXiv 2309.01507).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, overload

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from sparse_ds.optim.adamw_update import LARGEST_BETA, adamw_update_, compiled_adamw_update_, correction_table
from sparse_ds.optim.birth_steps import BirthSteps
from sparse_ds.optim.flat_segment import padding_positions
from sparse_ds.optim.moment_rounding import (
    BLOCK_ELEMENTS,
    TO_NEAREST,
    blocks_of,
    dynamic_map,
    quantize,
    random_bits,
    round_bfloat16,
)

Moments = Literal["float32", "bfloat16", "int8"]

# Elements updated at a time, a multiple of the block. It bounds the transient memory (measured: 53 bytes an element
# with int8 moments, 30 with bfloat16, 16 with float32) at 60 MB.
_CHUNK_ELEMENTS = 1 << 20
# With float32 moments a flat tensor from this size on is updated by one compiled kernel.
_COMPILED_ELEMENTS = 1 << 20


class SparseAdamW(torch.optim.Optimizer):
    """AdamW with ages for flat fp32 tensors that join pieces of many tensors; it never communicates.

    `params` at construction are those of the param groups; what is trained is what `register_flat` was told
    (DeepSpeed replaces the params of a group by one registered flat tensor before each `step`, and every flat tensor
    comes once per step of the engine).

    State of a flat tensor with n elements, `state[flat]`:

    ===================================================== ================================= =================
    entry                                                 dtype                             bytes a weight
    ===================================================== ================================= =================
    `step`: steps applied to this tensor                  Python int
    `births`: `step` when the age of each cohort was 0    Python ints
    `cohorts`: of the weights, where there are several    uint8 (up to 256) or int32        0, 1 or 4
    `exp_avg`, `exp_avg_sq`                               float32 or bfloat16 like `flat`   8 or 4
    the same with int8 moments: codes                     uint8 like `flat`                 2
    `exp_avg_absmax`, `exp_avg_sq_absmax` (int8 only)     float32, [ceil(n / 256)]          0.03125
    ===================================================== ================================= =================

    Memory: 8 bytes a weight with float32 moments, 4 with bfloat16, 2.03125 with int8, while all weights have one age;
    after an event 1 more, and 4 more from the 257th cohort on. Transient at most 60 MB; with float32 moments none where
    the compiled kernel runs (a million weights or more, and a compiler).

    Args:
        params: as for every torch optimizer.
        lr: learning rate; read at each step from the param group, so schedulers work.
        betas: decay of the running means of the gradient and of its square.
        eps: added to the root of the second moment; > 0, so that a weight without any gradient stays.
        weight_decay: decoupled, times lr, acts on the values (the deltas).
        moments: how both running means are stored between steps.
        age_warmup_steps: the learning rate of a weight rises over its first so many steps of age; 0: it does not.

    Attributes:
        paused: while True, `step` changes nothing, not even `step` and so no age.

    Example:
        >>> values = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = SparseAdamW([values], lr=0.1)
        >>> optimizer.register_flat(values)
        >>> values.grad = torch.tensor([1.0, -2.0])
        >>> optimizer.step()
        >>> values.data
        tensor([-0.1000,  0.1000])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        moments: Moments = "float32",
        age_warmup_steps: int = 0,
    ) -> None:
        for key, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{key}: got {value}, expected a number >= 0")
        if not 0 < eps < math.inf:
            raise ValueError(f"eps: got {eps}, expected a number > 0")
        if len(betas) != 2 or not all(0 <= beta <= LARGEST_BETA for beta in betas):
            raise ValueError(f"betas: got {betas}, expected two numbers from 0 to {LARGEST_BETA}")
        if age_warmup_steps < 0:
            raise ValueError(f"age_warmup_steps: got {age_warmup_steps}, expected 0 or more")
        if moments not in get_args(Moments):
            raise ValueError(f"moments: got {moments!r}, expected one of {', '.join(get_args(Moments))}")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self.paused = False
        self._moments, self._age_warmup_steps = moments, age_warmup_steps
        self._flats: dict[Tensor, _Flat] = {}

    @property
    def num_applied_steps(self) -> int:
        """Steps that were applied so far; the same for every flat tensor between two steps of the engine."""
        return next((int(self.state[flat]["step"]) for flat in self._flats), 0)

    @num_applied_steps.setter
    def num_applied_steps(self, num_steps: int) -> None:
        for flat in self._flats:
            self.state[flat]["step"] = num_steps

    def register_flat(self, flat: Tensor, padding: Sequence[tuple[int, int]] = ()) -> None:
        """Make the state of `flat`; once per flat tensor, before its first step.

        Args:
            flat: contiguous fp32 tensor of any shape, the very object that `step` will find in a param group.
            padding: (begin, end) of the elements that are no weights, in any order. Their gradients are never used
                (they may be uninitialised memory; `step` sets them to 0), and their values are never changed.

        Memory: the state, and 8 bytes per element of padding.
        """
        assert flat.dtype == torch.float32 and flat.is_contiguous(), (
            f"flat tensor: {flat.dtype}, expected contiguous fp32"
        )
        assert flat not in self._flats, "this flat tensor is registered already"
        for begin, end in padding:
            assert 0 <= begin <= end <= flat.numel(), (
                f"padding [{begin}, {end}) is outside of a flat tensor of {flat.numel()}"
            )
        self._flats[flat] = _Flat(len(self._flats), padding_positions(padding, flat.device), BirthSteps(flat))
        self.state[flat].update(step=0)
        self._note_births(flat)
        for name in ("exp_avg", "exp_avg_sq"):
            dtype = torch.uint8 if self._moments == "int8" else getattr(torch, self._moments)
            self.state[flat][name] = torch.zeros_like(flat, dtype=dtype, requires_grad=False)
            if self._moments == "int8":
                num_blocks = math.ceil(flat.numel() / BLOCK_ELEMENTS)
                self.state[flat][f"{name}_absmax"] = torch.zeros(num_blocks, device=flat.device)

    def _note_births(self, flat: Tensor) -> None:
        births, state = self._flats[flat].births, self.state[flat]
        state["births"] = tuple(births.steps)
        state.pop("cohorts", None)
        if births.cohorts is not None:
            state["cohorts"] = births.cohorts

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the flat tensors that are in the param groups now and have a gradient; nothing while `paused`.

        Raises:
            RuntimeError: a flat tensor is not registered.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.paused:
            return loss
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    self._step_flat(flat, group)
        return loss

    def _step_flat(self, flat: Tensor, group: dict[str, Any]) -> None:
        if flat not in self._flats:
            raise RuntimeError(
                f"AdamW got an unregistered tensor of {flat.numel()} elements: call register_flat before training"
            )
        assert flat.grad is not None
        state, registered = self.state[flat], self._flats[flat]
        state["step"] += 1
        values, grad = flat.detach().view(-1), flat.grad.view(-1).float()
        ages = [state["step"] - birth for birth in registered.births.steps]
        table = correction_table(ages, group["lr"], tuple(group["betas"]), self._age_warmup_steps, flat.device)
        settings = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        untouched = None
        if registered.padding is not None:
            grad.index_fill_(0, registered.padding, 0.0)
            untouched = values.index_select(0, registered.padding)
        if not self._step_compiled(values, grad, state, table, settings):
            for begin in range(0, flat.numel(), _CHUNK_ELEMENTS):
                chunk = slice(begin, min(begin + _CHUNK_ELEMENTS, flat.numel()))
                self._step_chunk(chunk, registered.number, values, grad, state, table, settings)
        if untouched is not None and registered.padding is not None:
            values.index_copy_(0, registered.padding, untouched)

    def _step_compiled(
        self, values: Tensor, grad: Tensor, state: dict[str, Any], table: Tensor, settings: dict[str, Any]
    ) -> bool:
        if self._moments != "float32" or values.numel() < _COMPILED_ELEMENTS:
            return False
        exp_avg, exp_avg_sq = (state[name].view(-1) for name in ("exp_avg", "exp_avg_sq"))
        return compiled_adamw_update_(values, grad, exp_avg, exp_avg_sq, _cohorts(state), table, **settings)

    def _step_chunk(
        self,
        chunk: slice,
        number: int,
        values: Tensor,
        grad: Tensor,
        state: dict[str, Any],
        table: Tensor,
        settings: dict[str, Any],
    ) -> None:
        exp_avg, exp_avg_sq = (self._read_moment(state, name, chunk) for name in ("exp_avg", "exp_avg_sq"))
        cohorts = _cohorts(state)
        cohorts = None if cohorts is None else cohorts[chunk]
        adamw_update_(values[chunk], grad[chunk], exp_avg, exp_avg_sq, cohorts, table, **settings)
        if self._moments != "float32":
            bits = random_bits(chunk, state["step"], number, values.device)
            self._write_moment(state, "exp_avg", chunk, exp_avg, bits & 0xFFFF)
            self._write_moment(state, "exp_avg_sq", chunk, exp_avg_sq, (bits >> 16) & 0xFFFF)

    def _read_moment(self, state: dict[str, Any], name: str, chunk: slice) -> Tensor:
        """[n] fp32 of one chunk: the state itself with float32 moments, otherwise a copy."""
        stored: Tensor = state[name].view(-1)[chunk]
        if self._moments != "int8":
            return stored.float()
        absmax = state[f"{name}_absmax"][blocks_of(chunk)]
        code = dynamic_map(name == "exp_avg", stored.device)
        decoded: Tensor = bnb.dequantize_blockwise(stored, absmax=absmax, code=code, blocksize=BLOCK_ELEMENTS)
        return decoded

    def _write_moment(
        self, state: dict[str, Any], name: str, chunk: slice, moment: Tensor, noise: Tensor | int
    ) -> None:
        """Store [n] fp32 `moment` of one chunk; `noise` from 0 to 2^16 - 1 decides how it is rounded."""
        stored = state[name].view(-1)[chunk]
        if self._moments == "float32":
            stored.copy_(moment)
        elif self._moments == "bfloat16":
            stored.copy_(round_bfloat16(moment, noise))
        else:
            codes, absmax = quantize(moment, name == "exp_avg", noise)
            stored.copy_(codes)
            state[f"{name}_absmax"][blocks_of(chunk)] = absmax

    def read_weight_states(self) -> dict[str, list[Tensor]]:
        """All state per weight, for events and checkpoints.

        `birth_step` is a copy always, 4 bytes a weight. With float32 moments these are the state tensors themselves,
        otherwise fp32 copies: 8 bytes a weight.

        Returns:
            `exp_avg`, `exp_avg_sq` (fp32) and `birth_step` (int32): one tensor per registered flat tensor, of its
            shape, in the order of registration.
        """
        states: dict[str, list[Tensor]] = {"exp_avg": [], "exp_avg_sq": [], "birth_step": []}
        for flat, registered in self._flats.items():
            states["birth_step"].append(registered.births.read())
            for name in ("exp_avg", "exp_avg_sq"):
                moment = self._read_moment(self.state[flat], name, slice(0, flat.numel()))
                states[name].append(moment.view_as(flat))
        return states

    @torch.no_grad()
    def write_weight_states(self, states: Mapping[str, Sequence[Tensor]]) -> None:
        """Take over what `read_weight_states` returned, changed or not; its padding becomes 0.

        Moments are rounded to nearest; what was not changed comes back bit for bit (int8: in the blocks in which no
        weight changed, and codes in the others only move if the block's maximum did).

        Args:
            states: as `read_weight_states` returns it.
        """
        for number, (flat, registered) in enumerate(self._flats.items()):
            for name in ("exp_avg", "exp_avg_sq", "birth_step"):
                given = states[name][number].view(-1)
                assert given.numel() == flat.numel(), f"{name} of flat tensor {number}: {given.numel()} elements"
                if registered.padding is not None:
                    given.index_fill_(0, registered.padding, 0)
                if name == "birth_step":
                    registered.births.write(given.view_as(flat))
                    self._note_births(flat)
                    continue
                for begin in range(0, flat.numel(), _CHUNK_ELEMENTS):
                    chunk = slice(begin, min(begin + _CHUNK_ELEMENTS, flat.numel()))
                    self._write_moment(self.state[flat], name, chunk, given[chunk], TO_NEAREST)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; the flat tensors must be registered and in the param groups.

        Raises:
            RuntimeError: a tensor is not registered, or its state was saved with other moments.
        """
        expected = {flat: dict(self.state[flat]) for flat in self._flats}
        super().load_state_dict(state_dict)
        for flat, state in self.state.items():
            if flat not in expected or state.keys() - {"cohorts"} != expected[flat].keys() - {"cohorts"}:
                raise RuntimeError(
                    f"AdamW state with {', '.join(state)} does not fit: register the flat tensors before loading, and "
                    f"keep optimizer.moments (now {self._moments})"
                )
            # torch has made everything fp32, like the parameter. That is exact (integers: below 2^24).
            for name, tensor in expected[flat].items():
                if isinstance(tensor, Tensor) and name != "cohorts":
                    state[name] = state[name].to(tensor.dtype)
            births = self._flats[flat].births
            births.take(list(state["births"]), state.get("cohorts"))
            self._note_births(flat)


@dataclass(frozen=True, eq=False)
class _Flat:
    """What is known of a registered flat tensor.

    Attributes:
        number: of registrations before it.
        padding: int64 positions of its padding; None without.
        births: of its elements.
    """

    number: int
    padding: Tensor | None
    births: BirthSteps


def _cohorts(state: dict[str, Any]) -> Tensor | None:
    cohorts: Tensor | None = state.get("cohorts")
    return None if cohorts is None else cohorts.view(-1)
