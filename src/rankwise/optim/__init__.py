"""Optimisers: gradient transformations that chain, as in optax, under one ``torch.optim.Optimizer``.

Method → file:

* ``adamw`` → adamw.py: AdamW.
* ``allora`` → allora.py: ALLoRA, a rate per output row.
* ``galore`` → galore.py: GaLore, Adam in a low-rank subspace of the gradient.
* ``lora_pro`` → lora_pro.py: LoRA-Pro, steps of A and B that match the full gradient.
* ``loraplus`` → loraplus.py: LoRA+, a larger rate for B.
* ``sgd`` → sgd.py: SGD with momentum.
"""

from rankwise.optim.base import Context, GradTransform, OptimizerMethod, Param, pairs
from rankwise.optim.combine import chain, masked, partition, switch
from rankwise.optim.coordinates import reparam, two_sided
from rankwise.optim.fused import adamw_chain
from rankwise.optim.moments import scale_by_adam, trace
from rankwise.optim.optimizer import TransformOptimizer
from rankwise.optim.projectors import IdentityProjector, Projector, RandomProjector, SvdProjector
from rankwise.optim.subspace import in_subspace, ratio_from_subspace
from rankwise.optim.transforms import clip, decoupled_decay, scale, scale_by_lr

__all__ = [
    "Context",
    "GradTransform",
    "IdentityProjector",
    "OptimizerMethod",
    "Param",
    "Projector",
    "RandomProjector",
    "SvdProjector",
    "TransformOptimizer",
    "adamw_chain",
    "chain",
    "clip",
    "decoupled_decay",
    "in_subspace",
    "masked",
    "pairs",
    "partition",
    "ratio_from_subspace",
    "reparam",
    "scale",
    "scale_by_adam",
    "scale_by_lr",
    "switch",
    "trace",
    "two_sided",
]
