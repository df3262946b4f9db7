"""Data: from the files that a user names to padded micro batches with a loss mask.

reading         files -> rows with their line numbers      formats         rows -> samples
sources         names -> files, folders, hub data sets     templates       the text around a sample
tokenization    samples -> ids and labels                  sample_prompts  what to ask before and after training
classification  labeled texts -> ids and numbers           labeled_texts   ... and their ids
collation       ids -> padded micro batches                building        all of it: the entry points
"""

from sparse_ds.data.building import DataBundle, DataSettings, TokenizedData, build_dataset, build_datasets
from sparse_ds.data.collation import CausalCollator, ClassificationCollator
from sparse_ds.data.labeled_texts import ClassifierInputs
from sparse_ds.data.sample_prompts import SamplePrompt, build_prompt

__all__ = [
    "CausalCollator",
    "ClassificationCollator",
    "ClassifierInputs",
    "DataBundle",
    "DataSettings",
    "SamplePrompt",
    "TokenizedData",
    "build_dataset",
    "build_datasets",
    "build_prompt",
]
