"""Admission policies: in which order waiting requests are tried, and what becomes of each."""
