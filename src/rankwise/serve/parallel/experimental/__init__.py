"""Tensor parallelism, checked for right answers but with no figure published: every device holds a slice of the base, of the keys and values, and of the adapters."""
