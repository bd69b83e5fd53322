"""Several adapters into one: lift, sparsify, weigh, combine, lower.  One file a family; a named merge is a row of it."""

from rankwise.merge.base import Merge, attach_merged, attach_state, merge_states, read_state

__all__ = ["Merge", "attach_merged", "attach_state", "merge_states", "read_state"]
