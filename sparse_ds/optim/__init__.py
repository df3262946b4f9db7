"""Optimizers of sparse values: local tensors only, they never communicate."""
