"""Settings of all tests."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

from hypothesis import settings

# The same examples in every run, and no time limit per example: machines that run tests are shared and slow at times.
settings.register_profile("sparse_ds", deadline=None, derandomize=True)
settings.load_profile("sparse_ds")

# Tokenized data of the runs of tests is kept where nobody else's is; read when `datasets` is imported, also in forks.
_cache = tempfile.mkdtemp(prefix="sparse_ds_test_cache_")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ["HF_DATASETS_CACHE"] = _cache
