"""The seam of loss terms: a scalar of the outputs, the original model's outputs where asked for, and the adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from rankwise.adapter import Adapter
    from rankwise.catalogue import MethodInfo


@dataclasses.dataclass(kw_only=True)
class LossTerm:
    """Base of all loss terms; dataclass fields are options (weights included).

    ``needs_reference``: the Session runs the same batch through the original model (empty view, no gradient, same
    mode without dropout) and hands its outputs over.
    """

    info: ClassVar[MethodInfo]
    needs_reference: ClassVar[bool] = False

    def check(self, forms: Sequence[Any], recipe: Any) -> None:
        """Refuse what this term cannot live with beyond its declared needs."""

    def term(self, outputs: Any, reference: Any | None, batch: Mapping[str, Any], adapter: Adapter, step: int) -> dict[str, Tensor]:
        """Named scalars whose sum is added to the task's loss; each is reported apart.

        Args:
            outputs: the model's, of this micro-batch.
            reference: the original model's, where ``needs_reference``; else None.
            batch: the micro-batch.
            adapter: in training.
            step: the optimiser step being taken, from 1.
        """
        raise NotImplementedError(f"The loss {type(self).__name__} must give its terms.")

    def grad_extra(self, adapter: Adapter, step: int) -> Mapping[str, Tensor]:
        """What this term adds to gradients itself, once a step, where autograd is not the way (a subgradient).

        Parameter name → tensor of its shape, of the parameters alone (so that data-parallel ranks agree), unscaled and
        not divided by micro-batches.  Frozen parameters' entries are left out of the step.
        """
        return {}
