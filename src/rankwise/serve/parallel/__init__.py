"""Tensor parallelism: every device holds a slice of the base, of the keys and values, and of the adapters (see the files)."""
