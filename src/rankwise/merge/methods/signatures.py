"""robust_signature: what robust training adds to a clean fine-tune, taken out as a patch for other models.

Per tensor, flattened, with θ_p the base, θ_c its clean fine-tune and θ_k its fine-tune on corruption k:

    u = θ_c − θ_p      v_k = θ_k − θ_p      RWS_k = v_k − (uᵀv_k / uᵀu)·u      (u = 0: RWS_k = v_k)
    patch = Σ_k α_k·RWS_k      α_k = α / K, applied once
    norms: (1/K)·Σ_k θ_k, as whole tensors

Only the first ``keep`` weight layers have a signature (a bias goes with its weight).  Two dot products a tensor stand for
the d×d projection matrix.

Source: VITA-Group/Robust_Weight_Signatures (reference 209).  It multiplies by α_k before the projection and again when
summing, so that K > 1 gives α_k²; built is the paper's α_k.  Its running statistics of batch norms are buffers, no
parameters: they stay the target's (``meta["left"]``), to be estimated again on the target's data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from rankwise.catalogue import register
from rankwise.delta.dense import Dense
from rankwise.delta.state import AdapterState
from rankwise.errors import MergeError, OptionError
from rankwise.merge.methods.weighings import Weighing
from rankwise.runtime.tensors import base_tensors
from rankwise.sites.discover import find_sites
from rankwise.sites.roles import layer_of

if TYPE_CHECKING:
    from rankwise.adapter import Adapter
    from rankwise.delta.base import Delta
    from rankwise.sites.site import Site

    Source = Mapping[str, Tensor] | Adapter


@register("merge", "robust_signature", title="Robust weight signature: a robustness patch", reference="209", exports_to_peft=True)
@dataclasses.dataclass(frozen=True, kw_only=True)
class RobustSignature(Weighing):
    """Σ_k α_k·(v_k − (uᵀv_k / uᵀu)·u), α_k = α·w_k / Σ w_k: u the clean adapter's change (the first source), v_k the robust ones'.

    The result is a patch to attach beside another adapter or on another model, weighted by a view's strength, and taken off
    to the bit.  Per site orthogonal to u; exact, of rank Σ r_t.  ``keep`` leaves only the first so many transformer blocks
    (robustness sits in shallow layers; None: all).  The clean adapter's weight is not used; u = 0 leaves v_k.  Of whole models,
    with their norms and biases: :func:`rankwise.merge.methods.signatures.signatures`.

    Source: VITA-Group/Robust_Weight_Signatures.  Errors: no robust adapter; robust weights that sum to zero; ``keep`` below 1.
    """

    breaks: ClassVar[frozenset[str]] = frozenset({"one source", "twins", "order"})
    checkpoints: ClassVar[bool] = False
    alpha: float = 1.0
    keep: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None and self.keep < 1:
            raise OptionError(f"The merge 'robust_signature' keeps at least the first block; it got keep = {self.keep}.")

    def leaves_out(self, name: str) -> bool:
        return self.keep is not None and not 0 <= layer_of(name) < self.keep

    def coefficients(self, gram: Tensor, w: Tensor) -> Tensor:
        if len(w) < 2:
            raise OptionError("The merge 'robust_signature' takes the clean adapter first, then at least one robust one; it got 1.")
        if abs(float(w[1:].sum())) < 1e-8:
            raise OptionError("The merge 'robust_signature' shares its strength by the robust weights, whose sum is 0.")
        share = self.alpha * w[1:] / w[1:].sum()
        along = gram[0, 1:] / gram[0, 0] if float(gram[0, 0]) > 0 else torch.zeros_like(share)
        return torch.cat([-(share @ along)[None], share])


def signatures(
    model: nn.Module,
    clean: Source,
    robust: Sequence[Source] | Mapping[str, Source],
    *,
    keep: int = 7,
    alpha: float = 1.0,
    norms: Literal["average", "leave"] = "average",
    levels: int | None = None,
) -> AdapterState:
    """The robustness patch as a value for ``rankwise.merge.attach_state``: dense changes, and norms whole.

    Args:
        model: the base θ_p; adapters on it are looked past.
        clean, robust: state dicts of whole models, or adapters of form ``full`` on models of the same shapes; ``robust`` by
            corruption, or in a list.
        keep: number of weight layers from the input that get a patch.  A tensor of no weight layer (tokens, positions)
            counts with the one before it, or with the first.
        alpha: total strength, shared evenly by the corruptions.
        norms: "average" gives every norm of the model the mean over the robust models; "leave" the target's.
        levels: quantise each tensor of the patch to so many values between its smallest and largest (:func:`quantise`).

    Raises:
        OptionError: keep or levels out of range; an unknown word.
        MergeError: no robust model; a source that lacks a tensor or has another shape; an adapter of another form.
    """
    if norms not in ("average", "leave"):
        raise OptionError(f"norms is 'average' or 'leave'; it is {norms!r}.")
    hard = list(robust.values() if isinstance(robust, Mapping) else robust)
    if not hard:
        raise MergeError("A signature is taken from at least one robust model; none was given.")
    base = dict(base_tensors(model))
    easy, tough = _tensors(clean, "clean"), [_tensors(s, f"robust[{i}]") for i, s in enumerate(hard)]
    early, norm_sites = _chosen(model, keep)
    sites: dict[str, Delta] = {}
    for site in early:
        name = parameter(site)
        p = base[name]
        u = _change(easy, "clean", name, p)
        total = torch.zeros_like(u)
        for i, theta in enumerate(tough):
            total += alpha / len(tough) * signature(_change(theta, f"robust[{i}]", name, p), u)
        change = total.float() if levels is None else quantise(total.float(), levels)
        sites[site.name] = Dense(site.view(change))
    full: dict[str, Tensor] = {}
    for site in norm_sites if norms == "average" else ():
        name = parameter(site)
        moves = [_change(t, f"robust[{i}]", name, base[name]) for i, t in enumerate(tough)]
        full[name] = (base[name].double() + torch.stack(moves).mean(0)).to(base[name].dtype)
    left = [n for n, b in model.named_buffers() if b.is_floating_point() and n.rpartition(".")[2].startswith("running_")]
    return AdapterState(sites, full, {"alpha": alpha / len(tough), "keep": keep, "levels": levels, "left": left})


def signature(v: Tensor, u: Tensor) -> Tensor:
    """The part of ``v`` that is orthogonal to ``u``, both of one shape; v itself where u is zero.  fp64."""
    v, u = v.double(), u.double()
    size = (u * u).sum()
    return v.clone() if size == 0 else v - (u * v).sum() / size * u


def quantise(values: Tensor, levels: int) -> Tensor:
    """The nearest of ``levels`` even steps from the smallest to the largest value; error ≤ (max − min)/(2(levels − 1)).

    Raises:
        OptionError: fewer than 2 levels.
    """
    if levels < 2:
        raise OptionError(f"levels = {levels}; a quantised patch needs at least 2 (its smallest and its largest value).")
    low, high = values.double().aminmax()
    if low == high:
        return values.clone()
    step = (high - low) / (levels - 1)
    return (low + ((values.double() - low) / step).round() * step).to(values.dtype)


def parameter(site: Site) -> str:
    """The full name of the site's parameter."""
    return f"{site.spec.module}.{site.spec.param}".lstrip(".")


def _chosen(model: nn.Module, keep: int) -> tuple[list[Site], list[Site]]:
    """(places of the first ``keep`` weight layers, norms), one for each tied storage."""
    known = getattr(model._modules.get("rankwise"), "known", None) or find_sites(model)
    wholes = [s for s in known.values() if s.spec.rows is None and s.spec.tie_group in ("", parameter(s))]
    norms = [s for s in wholes if s.spec.mode == "plain" and "norm" in s.spec.parent.lower()]
    names = {s.name for s in norms}
    early: list[Site] = []
    layers = 0
    for s in wholes:
        layers += s.spec.kind != "plain"
        if s.name not in names and layers <= keep:
            early.append(s)
    if not 1 <= keep <= layers:
        raise OptionError(f"keep = {keep}; this model has {layers} weight layers, of which 1 to {layers} can be patched.")
    return early, norms


def _tensors(source: Source, who: str) -> dict[str, Tensor]:
    """All parameters of a source by name."""
    if isinstance(source, Mapping):
        return dict(source)
    if any("weight" not in p.form.provides for p in source._record.parts):
        form = next(p.form.info.name for p in source._record.parts if "weight" not in p.form.provides)
        raise MergeError(
            f"The source {who} is an adapter of form {form!r}; a signature needs whole weights: form 'full', or a state dict."
        )
    moved = {parameter(s): s.param.detach() for s in source._record.site_of().values()}
    return {**dict(base_tensors(source.model)), **moved}


def _change(theta: Mapping[str, Tensor], who: str, name: str, base: Tensor) -> Tensor:
    """θ − θ_p in fp64."""
    if name not in theta or theta[name].shape != base.shape:
        got = tuple(theta[name].shape) if name in theta else "nothing"
        raise MergeError(
            f"The source {who} has {got} at {name!r}, and the base {tuple(base.shape)}; all must be fine-tunes of one model."
        )
    return theta[name].detach().to(base.device).double() - base.detach().double()
