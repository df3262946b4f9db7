"""Adapters as data: the trained deltas of a model, read from whatever holds them, one matrix at a time."""
