"""The seam of merges: sources are values, a method combines one tensor's stack at a time, the result is lowered again.

Lift (a :class:`~rankwise.merge.engine.stack.Stack` of factors or of whole tensors) → sparsify → weigh → combine → lower.  A
method is either a *weighing* (T numbers from inner products: exact, low-rank stays low-rank), an *entry-wise* rule
(blocks of rows), or something of its own (clusters, a joint basis).  Every merge reports, tensor by tensor, how far its
result is from the weighted sum Σ w_t·ΔW_t, and what cutting it to a rank cost.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from rankwise._renamed import renamed_argument, renamed_attribute, warn
from rankwise.catalogue import MethodInfo, make
from rankwise.delta.lowrank import LowRank
from rankwise.delta.state import AdapterState
from rankwise.errors import MergeError, OptionError
from rankwise.merge.engine.result import Merged, distance
from rankwise.merge.engine.stack import FactorPair, FactorStack, Stack, one_shape
from rankwise.seeds import generator

if TYPE_CHECKING:
    from rankwise.delta.base import Delta


class Source(Protocol):
    """What is merged: an :class:`AdapterState`, or a folder read one site at a time."""

    @property
    def full(self) -> Any: ...

    @property
    def sites(self) -> Any:
        """name → Delta; a mapping that may read on demand."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge:
    """Base of all merges; dataclass fields are options.

    Attributes:
        gauge_invariant: the result does not change when a source's (A, B) becomes (G·A, B·G⁻¹).
        breaks: names of laws (tests/merge) that do not hold for it, by design.
        count: exactly so many sources, or None.
        works_on: what a whole checkpoint's tensors are lifted to: "changes" from a base, or the "weights" themselves.
        adapters, checkpoints: what it takes.
        missing: what of a whole model's tensor that only some have, by default (:func:`~rankwise.merge.checkpoints.merge_checkpoints`).
        any_kind: it takes changes of any kind, not only low-rank ones (:meth:`add`).
        finds_weights: it finds its weights itself (:meth:`weigh`), from scores or gradients of a model.
        uses_weights: weights mean something to it; where not, giving them is refused.
        spreads: a value of a source that is not finite makes the result not finite, so that only that is looked at.
        whole_weights: each source counts 1 by default, not 1/T.
    """

    info: ClassVar[MethodInfo]
    typed: ClassVar[bool] = True
    gauge_invariant: ClassVar[bool] = True
    breaks: ClassVar[frozenset[str]] = frozenset()
    count: ClassVar[int | None] = None
    works_on: ClassVar[str] = "changes"
    adapters: ClassVar[bool] = True
    checkpoints: ClassVar[bool] = True
    missing: ClassVar[str] = "refuse"
    any_kind: ClassVar[bool] = False
    finds_weights: ClassVar[bool] = False
    uses_weights: ClassVar[bool] = True
    whole_weights: ClassVar[bool] = False
    spreads: ClassVar[bool] = False

    @property
    def needs_evaluator(self) -> bool:
        """Whether it must ask a model, for its weights or in :meth:`fit`."""
        return self.finds_weights

    @property
    def needs_oracle(self) -> bool:
        """The old spelling of :attr:`needs_evaluator`."""
        warn("Merge.needs_oracle", "Merge.needs_evaluator")
        return self.needs_evaluator

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        renamed_attribute(cls, {"needs_oracle": "needs_evaluator"})

    def fit(self, sources: Sequence[Source], evaluator: Any) -> Merge:
        """The rule with what it learns from all sites and the evaluator before any is merged; by default itself."""
        return self

    def check(self, names: Collection[str]) -> None:
        """Refuse options that name what is not among the sites or tensors to be merged."""

    def leaves_out(self, name: str) -> bool:
        """Whether the result does not change the site ``name``."""
        return False

    def add(self, found: Sequence[Delta | None], weights: Sequence[float]) -> Delta:
        """One site's merged value, of a method that takes ``any_kind``; None where a source lacks the site."""
        raise NotImplementedError(f"The merge {type(self).__name__} must add.")

    def notes(self, sources: Sequence[Source]) -> dict[str, Any]:
        """What else is to be told of the sources, for the result's ``meta``."""
        return {}

    def weigh(self, sources: Sequence[Source], evaluator: Any) -> Tensor | Mapping[str, Tensor]:
        """The weights, (T,) or a (T,) each site, of a method that needs an :class:`~rankwise.merge.judge.evaluator.Evaluator`."""
        raise NotImplementedError(f"The merge {type(self).__name__} must weigh.")

    def weigh_models(self, models: Any) -> Tensor | Mapping[str, Tensor]:
        """As :meth:`weigh`, of whole models (:class:`~rankwise.merge.judge.model_soups.Models`); by tensor where it gives a mapping."""
        raise NotImplementedError(f"The merge {type(self).__name__} must weigh whole models.")

    def combine(self, stack: Stack, seed: int) -> Merged:
        """One tensor's merged value."""
        raise NotImplementedError(f"The merge {type(self).__name__} must combine.")


@renamed_argument("oracle", "evaluator")
def merge_states(
    states: Sequence[Source],
    weights: Sequence[float] | None = None,
    method: str | Merge = "cat",
    *,
    seed: int = 0,
    progress: Callable[[str], None] = lambda name: None,
    evaluator: Any = None,
    **options: Any,
) -> AdapterState:
    """The merged value of adapters.

    Args:
        states: low-rank values (``adapter.lower()``), or anything whose ``sites`` gives them, one at a time.
        weights: one a source; default 1/T each.
        method: a registered merge or its name with ``options``.
        progress: called with each site's name when it is done.
        evaluator: a :class:`~rankwise.merge.judge.evaluator.Evaluator`, for a method that finds its own weights.

    Returns:
        A state whose ``meta`` has, by site, ``errors``: ‖merged − Σ w·ΔW‖/‖Σ w·ΔW‖, and ``truncation``: what cutting to
        a rank lost of the merged change; and ``weights``, one a source or {site: one a source}.

    Raises:
        MergeError: no source, a site that is not low-rank, shapes that differ, whole tensors that only a vote could merge.
        OptionError: a wrong option or number of weights or sources; an evaluator that is lacking, or that nothing would ask.
    """
    rule = rule_of(method, options, len(states))
    if not rule.adapters:
        raise OptionError(
            f"The merge {rule.info.name!r} takes whole checkpoints, not adapters; see rankwise methods {rule.info.name}."
        )
    _asked(rule, evaluator)
    everywhere = {n for s in states for n in s.sites}
    rule.check(everywhere)
    rule, given = rule.fit(states, evaluator), rule
    names = sorted(n for n in everywhere if not rule.leaves_out(n))
    by_site = _weights(rule, states, weights, evaluator, names)
    sites: dict[str, Delta] = {}
    errors: dict[str, float] = {}
    lost: dict[str, float] = {}
    for name in names:
        sites[name], errors[name], lost[name] = _site(rule, name, [s.sites.get(name) for s in states], by_site[name], seed)
        progress(name)
    one = len(set(by_site.values())) == 1
    used = list(next(iter(by_site.values()))) if one else {n: list(w) for n, w in by_site.items()}
    meta = {"errors": errors, "truncation": lost, "method": rule.info.name, "weights": used, **rule.notes(states)}
    learnt = {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule) if getattr(rule, f.name) != getattr(given, f.name)}
    return AdapterState(sites, full=_whole(states), meta={**meta, "found": learnt} if learnt else meta)


def _site(
    rule: Merge, name: str, found: Sequence[Delta | None], weights: tuple[float, ...], seed: int
) -> tuple[Delta, float, float]:
    """One site's value in fp32, its distance from the weighted sum, and what a rank lost."""
    if rule.any_kind:
        return rule.add(found, weights).to(torch.float32), 0.0, 0.0
    stack = FactorStack(name, weights, pairs=tuple(factors_of(d, name) for d in found))
    one_shape(stack)
    if not rule.spreads:
        _sound(stack)
    made = rule.combine(stack, seed)
    if not isinstance(made.value, LowRank):
        raise MergeError(f"The merge {rule.info.name!r} gave no low-rank change at {name!r}; this is a bug of the method.")
    error = distance(made.value, stack.total()) if made.error is None else made.error
    A, B = (t.float() for t in made.value.factors())
    if not _finite(A, B):
        _sound(stack)
        raise MergeError(f"The merge at {name!r} is beyond what fp32 holds; give smaller weights.")
    return LowRank(A, B, 1.0), error, made.truncation


def _sound(stack: FactorStack) -> None:
    """Refuse a source with values that are not finite."""
    for t, pair in enumerate(stack.pairs):
        if pair is not None and not _finite(*pair):
            raise MergeError(
                f"Source {t} (from 0) holds values at {stack.name!r} that are not finite; leave it out, or train it again."
            )


def _finite(*tensors: Tensor) -> bool:
    return all(math.isfinite(float(t.sum())) or bool(t.isfinite().all()) for t in tensors)


def rule_of(method: str | Merge, options: dict[str, Any], sources: int) -> Merge:
    """The method, checked against the number of sources."""
    if sources < 1:
        raise MergeError("There is nothing to merge; give at least one adapter.")
    rule: Merge = make("merge", method, **options) if isinstance(method, str) else method
    if rule.count is not None and sources != rule.count:
        raise OptionError(f"The merge {rule.info.name!r} is between {rule.count} sources; it got {sources}.")
    return rule


def _asked(rule: Merge, evaluator: Any) -> None:
    """Refuse an evaluator that nothing would ask, and its absence where something would."""
    if not rule.needs_evaluator and evaluator is not None:
        raise OptionError(f"The merge {rule.info.name!r} asks no evaluator; leave it out, or choose a soup.")
    if rule.needs_evaluator and evaluator is None:
        raise OptionError(
            f"The merge {rule.info.name!r} needs a score or gradients; give evaluator=Evaluator(model, …) (rankwise.merge.judge.evaluator)."
        )


def _weights(
    rule: Merge, states: Sequence[Source], weights: Sequence[float] | None, evaluator: Any, names: Sequence[str]
) -> dict[str, tuple[float, ...]]:
    """site → one weight a source: those given, or what the method finds with the evaluator."""
    given = given_weights(rule, weights, len(states))
    if not rule.finds_weights:
        return dict.fromkeys(names, given)
    found = rule.weigh(states, evaluator)
    if not isinstance(found, Mapping):
        return dict.fromkeys(names, weights_of(found.tolist(), len(states)))
    return {n: weights_of(found[n].tolist(), len(states)) for n in names}


def given_weights(rule: Merge, weights: Sequence[float] | None, sources: int) -> tuple[float, ...]:
    """The weights given or the method's default; refused where they would do nothing."""
    if weights is not None and rule.finds_weights:
        raise OptionError(
            f"The merge {rule.info.name!r} finds its weights itself; it got weights = {list(weights)}, leave them out."
        )
    if weights is not None and not rule.uses_weights:
        raise OptionError(
            f"The merge {rule.info.name!r} uses no weights; it got {list(weights)}, leave them out (rankwise methods {rule.info.name} "
            "says what decides instead)."
        )
    if weights is None and rule.whole_weights:
        return (1.0,) * sources
    return weights_of(weights, sources)


def weights_of(weights: Sequence[float] | None, sources: int) -> tuple[float, ...]:
    """One finite number a source; 1/T each by default."""
    given = tuple(1 / sources for _ in range(sources)) if weights is None else tuple(float(w) for w in weights)
    if len(given) != sources:
        raise OptionError(f"{len(given)} weights for {sources} adapters; give one each.")
    if not all(math.isfinite(w) for w in given):
        raise OptionError(f"The weights {list(given)} must be finite numbers.")
    return given


def _whole(states: Sequence[Source]) -> dict[str, Tensor]:
    """Whole tensors (heads, norms): kept where only one source has them or all agree to the bit, else refused."""
    out: dict[str, Tensor] = {}
    for i, s in enumerate(states):
        for name, tensor in (s.full or {}).items():
            if name in out and not torch.equal(out[name], tensor):
                raise MergeError(
                    f"Source {i} and one before it both hold {name!r} whole and differ: such a tensor (a head, a norm) may stand "
                    "for different labels, so it is not averaged. Leave it out of all but one."
                )
            out[name] = tensor
    return out


def state_of(source: Source) -> AdapterState:
    """A source as a value: itself, or all of a folder's sites read."""
    return source if isinstance(source, AdapterState) else AdapterState(dict(source.sites.items()), dict(source.full or {}))


def factors_of(d: Delta | None, name: str) -> FactorPair | None:
    """fp64 factors with √|s| on each side."""
    if d is None:
        return None
    if not isinstance(d, LowRank):
        raise MergeError(f"The source at {name!r} is a {d.kind} delta; lower() it to low rank first, which reports the error.")
    if d.A.dim() != 2:
        raise MergeError(f"The source at {name!r} is a stack of {d.A.shape[0]} experts; merge experts one by one.")
    if d.core is not None:
        A, B = d.factors()
        return A.double(), B.double()
    s = float(d.scale)
    if s == 1.0:
        return d.A.double(), d.B.double()
    A, B = (t.to(torch.float64, copy=True) for t in (d.A, d.B))
    return A.mul_(abs(s) ** 0.5), B.mul_(math.copysign(abs(s) ** 0.5, s))


def draws(rule: Merge, stack: Stack, seed: int) -> torch.Generator:
    """The generator of one method at one tensor."""
    return generator(seed, f"merge:{rule.info.name}", stack.name)


def share(name: str, option: str, value: float, *, zero: bool = False) -> None:
    """Refuse what is not a share in (0, 1] ([0, 1] where ``zero``).

    Args:
        name: of the merge, for the message.
        option: for the message.
        value: what was given.
        zero: 0 is allowed too.
    """
    if not (0 <= value <= 1 if zero else 0 < value <= 1):
        raise OptionError(f"The merge {name!r} takes {option} as a share in {'[' if zero else '('}0, 1]; it got {value}.")


def at_least_one(name: str, rank: int | None) -> None:
    if rank is not None and rank < 1:
        raise OptionError(f"The merge {name!r} cuts to a rank of at least 1; it got rank = {rank}.")


def one_of(name: str, option: str, value: str, among: Iterable[str]) -> None:
    """What was merged, and how far the result is from its parts.

    Args:
        name: of the merge, for the message.
        option: for the message.
        value: what was given.
        among: what may be.
    """
    if value not in among:
        raise OptionError(f"The merge {name!r} has {option} in {sorted(among)}; it got {value!r}.")
