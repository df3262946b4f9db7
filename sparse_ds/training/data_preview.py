"""`sparse-ds data preview`: the data of a run as training takes it, without a run."""

from __future__ import annotations

from dataclasses import dataclass

import transformers

from sparse_ds.config import RunConfig, UserError
from sparse_ds.data.preview import SourceFacts, look_at
from sparse_ds.data.token_doctor import Finding, RunFacts, examine
from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.model.build import read_architecture
from sparse_ds.model.find_base_model import find_base_model
from sparse_ds.model.kinds import check_task
from sparse_ds.model.tokenizer import load_tokenizer
from sparse_ds.training.run_data import read_run_data


@dataclass(frozen=True)
class DataPreview:
    """The training data, the held-out data if there is any, and what the doctor says of both."""

    sources: list[SourceFacts]
    findings: list[Finding]


def preview_data(config: RunConfig, num_samples: int) -> DataPreview:
    """Read the data of a run exactly as the run would, and look at it. Needs the model's tokenizer, not its weights.

    Args:
        config: the run.
        num_samples: how many samples of each source to show, 0 or more.

    Raises:
        UserError: anything wrong with the model's folder or the data.
    """
    if num_samples < 0:
        raise UserError(f"--samples: got {num_samples}, expected 0 or more.")
    folder = find_base_model(config.model.name_or_path, config.model.revision)
    transformers.utils.logging.set_verbosity_error()
    checkpoint = BaseCheckpoint(folder)
    check_task(checkpoint.config, checkpoint.folder, config.model.task)
    architecture = read_architecture(checkpoint)
    tokenizer = load_tokenizer(folder)
    plan = config.batch_plan(1)
    bundle = read_run_data(config, architecture, tokenizer, global_batch_size=plan.global_batch_size)
    length = config.data.sequence_length
    train = look_at(bundle.train_data, tokenizer, "data.train", length, num_samples)
    heldout = None
    if bundle.eval_data is not None:
        heldout = look_at(bundle.eval_data, tokenizer, "data.eval", length, num_samples)
    run = RunFacts(
        sequence_length=length,
        max_positions=getattr(architecture, "max_position_embeddings", None),
        vocabulary_size=getattr(architecture, "vocab_size", None),
        global_batch_size=plan.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        packing=config.data.packing if config.model.task == "causal_lm" else None,
    )
    sources = [facts for facts in (train, heldout) if facts is not None]
    return DataPreview(sources, examine(train, heldout, tokenizer, run))
