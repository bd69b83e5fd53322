"""Several adapters (or whole models) into one: lift, sparsify, weigh, combine, lower.

``base`` the seam · ``stack`` one tensor of all sources, by blocks · ``sums`` cat, svd, linear · ``weighings`` one number a
source · ``entries``, ``selections`` entry by entry · ``knots`` a joint basis · ``lego`` clusters of units · ``files`` values and models · ``folders`` adapters on
disk, a site at a time · ``checkpoints`` whole models (``model_folder`` read, ``jobs`` written) · ``mergekit`` its YAML · ``functional``, ``evaluator`` gradients and
scores of values · ``soups`` weights from an oracle · ``signatures`` robustness patches · ``interpolation``, ``straggler``, ``quality_diversity`` paths between values.
``logits``, ``decoding`` voices fused while decoding · ``overlap`` what adapters share.
"""

from rankwise._renamed import old_names
from rankwise.merge.engine.base import Merge, merge_states
from rankwise.merge.engine.files import attach_merged, attach_state, read_state
from rankwise.merge.judge.evaluator import Evaluator
from rankwise.merge.methods.weighings import row

__all__ = ["Evaluator", "Merge", "attach_merged", "attach_state", "merge_states", "read_state", "row"]
__getattr__ = old_names(__name__, "Oracle")
