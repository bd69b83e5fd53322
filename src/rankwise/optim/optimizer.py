"""One ``torch.optim.Optimizer`` that runs any gradient transformation.

What users of torch expect holds: real ``param_groups`` (one per learning-rate multiplier and decay), so
schedulers, accelerate, gradient scaling and ``transformers.Trainer`` work; ``step``, ``zero_grad``,
``state_dict``.  What torch leaves open is fixed: state is keyed by parameter *name*, restored without a cast,
freed on demand, and a parameter without a gradient is not touched, by weight decay neither.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rankwise.errors import ArtefactError, OptionError, RankwiseError, TrainingError, unknown
from rankwise.optim import state as trees
from rankwise.optim.base import POLICIES, Context, OptimizerMethod, Param, State, choose, work_dtype

LOW = (torch.bfloat16, torch.float16)
VERSION = 1


class TransformOptimizer(torch.optim.Optimizer):
    """A registered optimiser over named parameters.

    One ``step``: observers (parameters and gradients as they were) → transforms → apply → ``after_update`` →
    ``after`` callbacks.  Gradients of 16-bit parameters are raised to fp32, where moments and updates live.

    Args:
        method: a registered optimiser.
        params: every tensor that may be trained, also those that are frozen at first.
        lr: base rate; a group's is ``lr`` times the method's multiplier.
        weight_decay: decoupled; only where ``Param.decay``.
        betas, eps: override the method's own; refused if it has none.
        seed: of all draws.

    Attributes:
        observers: called as ``f(ctx, grads)`` before the transforms; may raise to stop the step untouched.
        after: called as ``f(ctx)`` last; may call ``resync``, ``drop``.
        frozen: names whose gradient is to be ignored (for wrappers under which requires_grad must not change).
        steps: steps taken.

    Raises:
        OptionError: two parameters of one name, or a rate or decay that is negative.
    """

    def __init__(
        self,
        method: OptimizerMethod,
        params: Iterable[Param],
        lr: float,
        weight_decay: float = 0.0,
        betas: Sequence[float] | None = None,
        eps: float | None = None,
        seed: int = 0,
    ) -> None:
        self.params = _by_name(params)
        for option, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not (value >= 0.0 and math.isfinite(value)):
                raise OptionError(f"{option} is {value!r}; expected a finite number ≥ 0.")
        self.method = _with(method, betas=betas, eps=eps)
        self.seed, self.peak, self.steps = int(seed), float(lr), 0
        self.transform = self.method.transform(self.params)
        self.tree: State = self.transform.init({})
        self.frozen: set[str] = set()
        self.observers: list[Callable[[Context, dict[str, Tensor]], Any]] = []
        self.after: list[Callable[[Context], Any]] = []
        self.logs: dict[str, Any] = {}
        self._born: set[str] = set()  # the parameters whose state exists
        self._closed = False
        super().__init__(self._groups(lr, weight_decay), {"lr": lr, "weight_decay": weight_decay})
        self._closed = True

    def _groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        split: dict[tuple[float, bool], list[Param]] = {}
        for p in self.params.values():
            split.setdefault((float(self.method.lr_multiplier(p)), p.decay), []).append(p)
        return [
            {
                "params": [(p.name, p.tensor) for p in members],
                "lr": lr * multiplier,
                "weight_decay": weight_decay if decay else 0.0,
                "multiplier": multiplier,
            }
            for (multiplier, decay), members in sorted(split.items(), key=lambda item: (item[0][0], not item[0][1]))
        ]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: a parameter needs a name and a role, see :class:`Param`."""
        if self._closed:
            raise RankwiseError(
                "A TransformOptimizer gets all its parameters when it is made; give those to be trained later from the "
                "start (a parameter without a gradient is not touched and holds no state)."
            )
        super().add_param_group(param_group)

    # ---- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step; returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ctx, grads = self._gather()
        for observe in self.observers:
            observe(ctx, grads)
        self.steps = ctx.step
        born = [n for n in grads if n not in self._born]
        if born:
            trees.merge(self.tree, self.transform.init({n: self.params[n] for n in born}))
            self._born.update(born)
        taken, calls = self.transform.fuse(grads, self.tree, self.params, ctx)
        rest = {n: g for n, g in grads.items() if n not in taken} if taken else grads
        updates = self.transform.update(rest, self.tree, self.params, ctx) if rest else {}
        for call in calls:
            call()
        for name, u in updates.items():
            _add(self.params[name].tensor, u)
        self.transform.after_update({n: self.params[n] for n in grads}, self.tree, ctx)
        self.logs = ctx.logs
        for follow in self.after:
            follow(ctx)
        return loss

    def _gather(self) -> tuple[Context, dict[str, Tensor]]:
        """The step's context and its gradients by name, in the work dtype."""
        self._check_ratio()
        first = self.param_groups[0]
        lr = float(first["lr"]) / first["multiplier"] if first["multiplier"] else float(first["lr"])
        grads: dict[str, Tensor] = {}
        lrs: dict[str, float] = {}
        decays: dict[str, float] = {}
        params, frozen = self.params, self.frozen
        for group in self.param_groups:
            rate, decay = float(group["lr"]), float(group["weight_decay"])
            for name, tensor in zip(group["param_names"], group["params"]):
                param = params[name]
                if param.tensor is not tensor:
                    param.tensor = tensor  # a wrapper (FSDP2 through accelerate) has put its own in the group
                g = tensor.grad
                if g is None or name in frozen:
                    continue
                if g.is_sparse:
                    raise TrainingError(f"{name!r} has a sparse gradient; use sparse=False on the embedding.")
                grads[name] = g.float() if g.dtype in LOW else g
                lrs[name] = rate
                decays[name] = decay
        ratio = lr / self.peak if self.peak else 1.0
        return Context(self.steps + 1, lr, ratio, self.seed, params, lrs, decays), grads

    def _check_ratio(self) -> None:
        groups = self.param_groups
        if len(groups) < 2 or len({g["multiplier"] for g in groups}) < 2:
            return
        rates = {float(g["lr"]) for g in groups}
        if len(rates) == 1 and rates != {0.0}:
            raise TrainingError(
                f"Every param group has the rate {groups[0]['lr']!r}, although the method gives them different ones: "
                "something set one rate for all. Scale each group's own, for example with LambdaLR, or give the "
                "scheduler one value per group."
            )

    # ---- state that outlives, moves or goes

    def resync(self, name: str, kept: Any = None, policy: str = "keep") -> None:
        """Adjust the state of a parameter whose components a budget has pruned, grown or restarted.

        Args:
            name: the parameter.
            kept: indices along the component axis (int64, any device), or None for the full tensor.
            policy: ``keep`` nothing changes; ``drop`` the state is freed and starts again at the next gradient;
                ``zero`` the components not in ``kept`` (None: all) restart with zero moments and age 0; ``slice``
                the tensor has been resized: its component i is the old kept[i], or new where kept[i] is −1.

        Raises:
            UnknownName, OptionError: no such parameter; a policy the tensor cannot take.
        """
        choose("policy", policy, POLICIES)
        if name not in self.params:
            raise unknown("parameter of this optimiser", name, self.params)
        if policy == "drop":
            if kept is not None:
                raise OptionError("Policy 'drop' frees a whole tensor's state; for components use 'zero' or 'slice'.")
            self.drop([name])
        elif name in self._born:
            index = None if kept is None else torch.as_tensor(kept, dtype=torch.long)
            self.transform.resync(self.tree, name, index, policy)

    def drop(self, names: Iterable[str]) -> None:
        """Free all state of ``names``: the memory is given back, and a later gradient starts anew."""
        gone = set(names)
        for name in gone - self.params.keys():
            raise unknown("parameter of this optimiser", name, self.params)
        trees.free(self.tree, gone, self.params)
        self._born -= gone

    def state_elements(self) -> dict[str, int]:
        """Tensor elements of state held for each parameter (those without state are absent)."""
        return trees.elements(self.tree, self.params)

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Everything a resumed run needs, of plain dicts, lists, numbers and tensors (``weights_only`` loads it).

        Tensors are references, as torch's are: copy them (or save) before the next step.
        """
        state = {
            "version": VERSION,
            "method": _name(self.method),
            "options": _options(self.method),
            "steps": self.steps,
            "peak": self.peak,
            "seed": self.seed,
            "born": sorted(self._born),
            "frozen": sorted(self.frozen),
            "tree": trees.copied(self.tree, self.params, lambda _, t: t),
        }
        named = [{**g, "params": list(g["param_names"]), "param_names": list(g["param_names"])} for g in self.param_groups]
        return {"state": state, "param_groups": named}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Restore a ``state_dict`` exactly: same dtypes, tensors copied to their parameter's device.

        Raises:
            ArtefactError: the state is of another method, of other options or of other parameters.
        """
        saved, groups = _checked(state_dict, self)
        self.steps, self.peak, self.seed = int(saved["steps"]), float(saved["peak"]), int(saved["seed"])
        self._born, self.frozen = set(saved["born"]), set(saved["frozen"])

        def place(who: str | None, t: Tensor) -> Tensor:
            return t.detach().clone() if who is None else t.detach().to(self.params[who].tensor.device, copy=True)

        self.tree = trees.copied(saved["tree"], self.params, place)
        for group in self.param_groups:
            kept = {k: v for k, v in groups[frozenset(group["param_names"])].items() if not k.startswith("param")}
            group.update(kept)

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle: all but the callbacks, which belong to the training loop."""
        out = {k: v for k, v in self.__dict__.items() if k != "step"}  # a scheduler puts a wrapper of step there
        return {**out, "observers": [], "after": []}


def _by_name(params: Iterable[Param]) -> dict[str, Param]:
    """Parameters sorted by name, so that their order when given changes nothing."""
    out: dict[str, Param] = {}
    for p in sorted(params, key=lambda p: p.name):
        if p.name in out:
            raise OptionError(f"Two parameters are called {p.name!r}; names are the keys of the optimiser's state.")
        out[p.name] = p
    if not out:
        raise OptionError("The optimiser got no parameters; nothing would be trained.")
    return out


def _with(method: OptimizerMethod, **given: Any) -> OptimizerMethod:
    """``method`` with its own options overridden; OptionError if it has no such option."""
    given = {k: v for k, v in given.items() if v is not None}
    fields: set[str] = {f.name for f in dataclasses.fields(method)} if dataclasses.is_dataclass(method) else set()
    for option in given.keys() - fields:
        raise OptionError(f"The optimiser {_name(method)!r} has no {option}; leave it out.")
    return dataclasses.replace(method, **given) if given else method  # type: ignore[type-var]


def _name(method: OptimizerMethod) -> str:
    info = getattr(method, "info", None)
    return info.name if info is not None else type(method).__qualname__


def _options(method: OptimizerMethod) -> dict[str, Any]:
    if not dataclasses.is_dataclass(method):
        return {}
    plain = dataclasses.asdict(method)  # type: ignore[call-overload]
    return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}


def _add(tensor: Tensor, update: Tensor) -> None:
    if tensor.dtype in LOW:
        tensor.copy_(tensor.to(work_dtype(tensor)) + update)  # one rounding, of the sum
    else:
        tensor.add_(update)


def _checked(state_dict: dict[str, Any], mine: TransformOptimizer) -> tuple[dict[str, Any], dict[frozenset, dict]]:
    """(state, groups by their set of names) of a state dict that fits ``mine``, or ArtefactError."""
    saved, listed = state_dict.get("state"), state_dict.get("param_groups")
    if not isinstance(saved, dict) or saved.get("version") != VERSION or not isinstance(listed, list):
        raise ArtefactError("This is not the state of a rankwise optimiser (version 1); start without it.")
    for what, theirs, ours in (
        ("method", saved["method"], _name(mine.method)),
        ("options", saved["options"], _options(mine.method)),
    ):
        if theirs != ours:
            raise ArtefactError(f"The optimiser state has {what} {theirs!r}, this optimiser {ours!r}; use the same.")
    groups = {frozenset(g["params"]): g for g in listed}
    own = {frozenset(g["param_names"]) for g in mine.param_groups}
    if set(groups) != own:
        odd = sorted(frozenset().union(*groups) ^ frozenset().union(*own))
        what = f"parameters differ, for example {odd[0]!r}" if odd else "the same parameters are grouped otherwise"
        raise ArtefactError(f"The optimiser state does not fit this optimiser: {what}; build it from the same recipe.")
    return saved, groups
