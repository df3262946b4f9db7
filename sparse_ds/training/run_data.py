"""The data of a run, for the run and for looking at it: one configuration, one way to read it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparse_ds.config import RunConfig
from sparse_ds.data import ClassifierInputs, DataBundle, build_datasets
from sparse_ds.data.token_cache import default_folder
from sparse_ds.model.kinds import input_facts

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def read_run_data(
    config: RunConfig,
    architecture: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    global_batch_size: int,
    num_sample_prompts: int = 0,
    show_progress: bool = False,
    show_bar: bool | None = None,
) -> DataBundle:
    """Read and tokenize what section `data` names. Collectives: none; every rank gets the same.

    Args:
        config: the run.
        architecture: of the base model.
        tokenizer: of the base model; its chat template becomes the one that `data.template` names.
        global_batch_size: samples of one optimizer step.
        num_sample_prompts, show_progress, show_bar: as of `build_datasets`.

    Raises:
        UserError: anything wrong with the data.
    """
    return build_datasets(
        config.data,
        tokenizer,
        task=config.model.task,
        seed=config.train.seed,
        global_batch_size=global_batch_size,
        classifier_inputs=ClassifierInputs(**input_facts(architecture)),
        num_sample_prompts=num_sample_prompts,
        show_progress=show_progress,
        cache_folder=_cache_folder(config),
        show_bar=show_bar,
    )


def _cache_folder(config: RunConfig) -> Path | None:
    """Of tokenized data; None: nothing is kept."""
    data = config.data
    if not data.cache:
        return None
    return default_folder() if data.cache_dir is None else Path(data.cache_dir)
