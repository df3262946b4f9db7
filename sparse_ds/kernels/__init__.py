"""One operation a file, on local tensors; each with a plain torch reference."""
