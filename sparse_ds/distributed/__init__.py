"""The only package that imports torch.distributed and deepspeed."""
