"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# The same examples in every run, and no time limit per example: machines that run tests are shared and slow at times.
settings.register_profile("sparse_ds", deadline=None, derandomize=True)
settings.load_profile("sparse_ds")
