"""Several adapters (or whole models) into one: lift, sparsify, weigh, combine, lower.

``methods/``  the registered merges, each a class with ``combine`` or a row of a table; its ``__init__`` lists which file holds which.
``engine/``   what all of them stand on: ``base`` (:class:`Merge`, :func:`merge_states`), ``stack`` (one tensor of all sources, by
    blocks), ``result``, ``files`` (values and models), ``folders`` (adapters on disk, one site at a time), ``model_folder`` and
    ``jobs`` (whole models read and written).
``judge/``    scores and gradients of values on a model (:class:`Evaluator`), held-out data, soups of whole models, overlaps.
``checkpoints`` merges whole models, ``mergekit`` runs its YAML, ``search`` tries options by held-out scores.

A plug-in registers a merge by :func:`row`, from the sources' inner products to one number a source, or as a :class:`Merge` whose
``combine`` gives a :class:`Merged`.  Models that decode together, their logits combined, are in :mod:`rankwise.decoding`.
"""

from rankwise._renamed import old_names
from rankwise.merge.engine.base import Merge, merge_states
from rankwise.merge.engine.files import attach_merged, attach_state, read_state
from rankwise.merge.engine.result import Merged
from rankwise.merge.judge.evaluator import Evaluator
from rankwise.merge.methods.weighings import row

__all__ = ["Evaluator", "Merge", "Merged", "attach_merged", "attach_state", "merge_states", "read_state", "row"]
__getattr__ = old_names(__name__, "Oracle")
