"""Thousands of adapters served over one base, and trained beside it."""
