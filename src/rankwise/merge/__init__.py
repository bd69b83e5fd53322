"""Several adapters (or whole models) into one: lift, sparsify, weigh, combine, lower.

``base`` the seam · ``stack`` one tensor of all sources, by blocks · ``sums`` cat, svd, linear · ``weighings`` one number a
source · ``entries``, ``selections`` entry by entry · ``knots`` a joint basis · ``lego`` clusters of units · ``files`` values and models · ``folders`` adapters on
disk, a site at a time · ``checkpoints`` whole models (``model_folder`` read, ``jobs`` written) · ``mergekit`` its YAML · ``functional``, ``oracle`` gradients and
scores of values · ``soups`` weights from an oracle · ``signatures`` robustness patches · ``interpolation``, ``straggler``, ``quality_diversity`` paths between values.
``logits``, ``decoding`` voices fused while decoding · ``overlap`` what adapters share.
"""

from rankwise.merge.base import Merge, merge_states
from rankwise.merge.files import attach_merged, attach_state, read_state
from rankwise.merge.oracle import Oracle

__all__ = ["Merge", "Oracle", "attach_merged", "attach_state", "merge_states", "read_state"]
