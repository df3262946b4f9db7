"""Adapters as PEFT stores them, `supertuning` and `shira`: written so that stock PEFT loads them, and read back."""
