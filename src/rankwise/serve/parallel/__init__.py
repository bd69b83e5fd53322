"""Tensor parallelism.  No part of it has a figure in docs/performance.md yet, so all of it is in :mod:`.experimental`."""
