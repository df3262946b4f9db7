"""Data: from the files that a user names to padded micro batches with a loss mask.

reading         files -> rows with their line numbers      formats         rows -> samples
sources         names -> files, folders, hub data sets     conversations   rows that hold conversations
folders         which files make up a split                row_fields      one field of a row, checked
templates       the text around a sample                   samples         what rows become
named_templates chat templates by name or from a file      bad_rows        rows that cannot be used
tokenization    samples -> ids and labels                  sample_reader   a source's rows -> tokenized samples
classification  labeled texts -> ids and numbers           labeled_texts   ... and their ids
mixture         several sources in one training set        streaming       data read while it is used
packing         several samples to one row                 row_stream      the order of a stream's rows
collation       ids -> padded micro batches                sample_prompts  what to ask before and after training
tokenized       one source, tokenized                      token_cache     tokenized once, kept on disk
building        all of it: the entry points                fingerprint     a sha256 of the samples
"""

from sparse_ds.data.building import DataBundle, DataSettings, build_dataset, build_datasets
from sparse_ds.data.collation import CausalCollator, ClassificationCollator, PackedCollator
from sparse_ds.data.labeled_texts import ClassifierInputs
from sparse_ds.data.sample_prompts import SamplePrompt, build_prompt
from sparse_ds.data.tokenized import TokenizedData

__all__ = [
    "CausalCollator",
    "ClassificationCollator",
    "ClassifierInputs",
    "DataBundle",
    "DataSettings",
    "PackedCollator",
    "SamplePrompt",
    "TokenizedData",
    "build_dataset",
    "build_datasets",
    "build_prompt",
]
