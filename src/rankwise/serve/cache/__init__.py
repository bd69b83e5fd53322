"""Blocks of the key-value cache: who holds them, and which are shared."""
