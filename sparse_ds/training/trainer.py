"""`transformers.Trainer` with our optimizer, our data order and our evaluation; the engine is DeepSpeed ZeRO-3.

What Trainer keeps: the loop, gradient accumulation, the learning rate schedule, callbacks, logging. What happens
between `engine.step()` and the next forward pass is in `callbacks`.

The loss of a step is the mean over all trained tokens of its global batch, however they are dealt out:

    n = labels[:, 1:] != -100, summed over the micro batches of the step and over the ranks     get_batch_samples
    loss of a micro batch = R * sum of its negative log-likelihoods / n                         the model, compute_loss
    gradient = sum over micro batches, mean over the R ranks                                    DeepSpeed

So neither padding, nor packing, nor a micro batch with few trained tokens changes the weight of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer

from sparse_ds.distributed.zero3_partitions import all_reduce_sum, release_gathered
from sparse_ds.monitor.summary import perplexity
from sparse_ds.sparse.held_deltas import deltas_held
from sparse_ds.sparse.sparse_linear import SparseLinear
from sparse_ds.training.evaluation import HeldoutResult, heldout_loss
from sparse_ds.training.global_order import GlobalOrderSampler
from sparse_ds.training.skipped_steps import with_gradient_of_its_kind

OnSave = Callable[[], None]
MakeOptimizer = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def classification_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int) -> Tensor:
    """Trainer's `compute_loss_func`: this micro batch's share of the mean over the whole global batch.

    Args:
        outputs: of the model, with logits [B, L].
        labels: [B].
        num_items_in_batch: samples of all micro batches of all ranks of the step.
    """
    return F.cross_entropy(outputs.logits.float(), labels, reduction="sum") / num_items_in_batch


class SparseTrainer(Trainer):
    """See the module docstring.

    Args:
        make_optimizer: makes the inner optimizer from the trainable parameters, in the order of the model.
        sampler: order of the training samples.
        heldout: tokenized held-out data, or None.
        collate_heldout: makes its micro batches; None: as those of the training data.
        holding: layers whose deltas stay in the weights for a whole micro batch (`sparse.held_deltas`).
        count_pairs: lengths of samples -> queries with the keys that they see (`model.flops.StepFlops.count_pairs`).
        on_save: saves a checkpoint; called on every rank when Trainer wants one.
        on_restore_generators: in a run that goes on, called when the random generators have to be set back.
        **kwargs: as for `transformers.Trainer`.
    """

    def __init__(
        self,
        *,
        make_optimizer: MakeOptimizer,
        sampler: GlobalOrderSampler,
        heldout: Any | None,
        on_save: OnSave,
        collate_heldout: Callable[[list[dict[str, Any]]], dict[str, Tensor]] | None = None,
        holding: Sequence[SparseLinear] = (),
        count_pairs: Callable[[Tensor], Tensor] = lambda lengths: lengths.new_zeros(()),
        on_restore_generators: OnSave = lambda: None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._on_save, self._on_restore_generators = on_save, on_restore_generators
        self._make_optimizer = make_optimizer
        self._sampler, self._holding = sampler, holding
        self._heldout, self._collate_heldout = heldout, collate_heldout or self.data_collator
        self._count_pairs = count_pairs
        self._work = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        """(tokens, pairs) that this rank has seen since the last call of `count_work`, padding excluded. On the device:
        a count on the host would make it wait in every micro batch."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            parameters = [p for p in (self.model if model is None else model).parameters() if p.requires_grad]
            self.optimizer = self._make_optimizer(parameters)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> GlobalOrderSampler:
        return self._sampler

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        # Trainer would ask DeepSpeed for a checkpoint of its own kind; ours is restored once the engine is bound.
        return super()._prepare_for_training(max_steps, train_dataloader, None)

    def _load_rng_state(self, checkpoint: Any) -> None:
        if checkpoint is not None:
            self._on_restore_generators()

    def _run_epoch(self, **kwargs: Any) -> None:
        # A run that goes on from its last step has none left; Trainer would make one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._on_save()

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        # Packed rows say it themselves: they have no attention mask.
        lengths = inputs.pop("sample_lengths", None)
        lengths = inputs["attention_mask"].sum(-1) if lengths is None else lengths
        counted = torch.stack([lengths.sum().double(), self._count_pairs(lengths).double()])
        self._work += counted.to(self._work.device)
        with deltas_held(self._holding):
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return with_gradient_of_its_kind(super().compute_loss(model, inputs, *args, **kwargs))

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *args: Any, **kwargs: Any) -> None:
        # Trainer starts its sum of losses anew by subtracting it from itself: one NaN would stay for ever.
        logs = self.control.should_log
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)
        if logs:
            tr_loss.nan_to_num_(nan=0.0)

    @property
    def loss_sum(self) -> Tensor:
        """Of this rank, since the last log line: fp32, 0-D."""
        loss_sum: Tensor = self._tr_loss
        return loss_sum

    @property
    def uncounted_work(self) -> Tensor:
        """(tokens, pairs) of this rank since the last call of `count_work`: fp64 [2]."""
        return self._work

    @property
    def last_logged_step(self) -> int:
        """Step of the last log line."""
        return int(self._globalstep_last_logged)

    def set_sums(self, loss_sum: float, work: Tensor, last_logged_step: int) -> None:
        """Go on with these sums of this rank; after `train` has begun."""
        self._tr_loss.fill_(loss_sum)
        self._work.copy_(work)
        self._globalstep_last_logged = last_logged_step

    def count_work(self) -> tuple[int, int]:
        """Tokens that all ranks have seen since the last call, and queries with the keys that they see.

        Collectives: one all-reduce; every rank must call it.
        """
        num_tokens, num_pairs = all_reduce_sum(self._work.tolist(), self.args.device)
        self._work.zero_()
        return int(num_tokens), int(num_pairs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out loss, and perplexity, or the scores of a classification; the log entries are `<prefix>_loss`,
        `<prefix>_perplexity`, `<prefix>_accuracy`, ...

        Collectives: those of `heldout_loss`; every rank must call it.
        """
        result = self.heldout_result()
        metrics = {f"{metric_key_prefix}_loss": result.loss}
        if result.scores:
            metrics |= {f"{metric_key_prefix}_{name}": score for name, score in result.scores.items()}
            metrics[f"{metric_key_prefix}_num_samples"] = result.num_counted
        else:
            metrics[f"{metric_key_prefix}_perplexity"] = perplexity(result.loss)
            metrics[f"{metric_key_prefix}_num_tokens"] = result.num_counted
        if result.hidden_delta_fraction is not None:
            metrics[f"{metric_key_prefix}_hidden_delta_fraction"] = result.hidden_delta_fraction
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def heldout_result(self) -> HeldoutResult:
        """Held-out loss of the model as it is now. Collectives: as `evaluate`."""
        assert self._heldout is not None
        result = heldout_loss(
            self.model_wrapped, self._heldout, self._collate_heldout, self.args.eval_batch_size, self.args.device
        )
        self.release_gathered()
        return result

    def release_gathered(self) -> None:
        """Give back all gathered parameters. After evaluation nearly all are still gathered; after an event they hold
        the old contents. Collectives: none."""
        release_gathered(self.deepspeed)
