"""Run calibration batches through the model and give each site's accumulator what it asks for.

The gradient of a frozen or quantised weight is computed at its layer from x and ∂L/∂y, passed on and freed.
Everything that is changed for the pass (mode, hooks, requires_grad) is restored, also on error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rankwise.errors import AttachError, DataError

if TYPE_CHECKING:
    from rankwise.sites.site import Site


class Accumulator:
    """A running statistic of one site.

    ``hook`` says what ``update`` gets: ``input`` → x as rows (n, in) of unmasked tokens; ``weight_grad`` → ∂L/∂W of one
    batch, fp32 out×in (E×out×in).  ``merge`` is associative, so batches, ranks and clients may be split at will.
    ``share`` lets sites with the very same input use one accumulator.
    """

    hook: ClassVar[Literal["input", "weight_grad"]] = "input"
    share: ClassVar[bool] = False

    def update(self, value: Tensor) -> None:
        raise NotImplementedError

    def merge(self, other: Any) -> None:
        raise NotImplementedError

    def finish(self) -> Any:
        """The statistic itself."""
        raise NotImplementedError

    def done(self) -> bool:
        """True once more batches would change nothing that matters; the pass stops when all accumulators say so."""
        return False

    def memory(self, site: Site) -> int:
        """Bytes this accumulator holds at its site, for passes within a memory limit."""
        return 4 * site.spec.inp * site.spec.out


class Stats(dict[str, Any]):
    """site name → finished statistic."""


def calibrate(
    model: nn.Module,
    sites: Sequence[Site],
    requests: Mapping[str, Accumulator],
    batches: Iterable[Any],
    *,
    label_mask: bool = True,
    memory_limit: int | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
) -> Stats:
    """Run ``batches`` through ``model`` (eval mode) and return each requested site's statistic.

    Args:
        model: with every adapter off.
        sites: those of ``requests``.
        requests: {site: accumulator}; sites of an input group share one accumulator where its class allows it.
        batches: dicts of the model's keyword inputs (tensors are moved to the model's device).
        label_mask: leave out tokens whose label is −100 as well as padding.
        memory_limit: bytes; sites are then served in several passes over the batches, which must be re-iterable.
        loss: (outputs, batch) → scalar; default the model's own loss.

    Raises:
        DataError: no batch, or a batch without labels where gradients are needed.
        AttachError: an accumulator asks for the input of a site whose weight is read, not called with x.
    """
    by_name = {s.name: s for s in sites}
    leaders = _leaders(by_name, requests)
    active = {n: requests[n] for n in requests if leaders[n] == n}
    for group in _passes(by_name, active, memory_limit):
        _run(model, {n: by_name[n] for n in group}, {n: active[n] for n in group}, batches, label_mask, loss)
    finished = {n: acc.finish() for n, acc in active.items()}
    return Stats({n: finished[leaders[n]] for n in requests})


def _leaders(sites: Mapping[str, Site], requests: Mapping[str, Accumulator]) -> dict[str, str]:
    first: dict[tuple[str, type], str] = {}
    out: dict[str, str] = {}
    for name, acc in requests.items():
        group = sites[name].spec.input_group
        out[name] = first.setdefault((group, type(acc)), name) if group and acc.share else name
    return out


def _passes(sites: Mapping[str, Site], active: Mapping[str, Accumulator], limit: int | None) -> list[list[str]]:
    if limit is None:
        return [list(active)]
    out: list[list[str]] = [[]]
    used = 0
    for name, acc in active.items():
        size = acc.memory(sites[name])
        if out[-1] and used + size > limit:
            out.append([])
            used = 0
        out[-1].append(name)
        used += size
    return out


def _run(
    model: nn.Module,
    sites: Mapping[str, Site],
    accs: Mapping[str, Accumulator],
    batches: Iterable[Any],
    label_mask: bool,
    loss: Any,
) -> None:
    grads = any(a.hook == "weight_grad" for a in accs.values())
    device = next(model.parameters()).device
    seen = 0
    with _watched(model, sites, accs) as mask_box:
        for batch in batches:
            batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in dict(batch).items()}
            seen += 1
            mask_box[0] = _mask(batch, label_mask)
            with torch.set_grad_enabled(grads):
                out = model(**batch if grads else {k: v for k, v in batch.items() if k != "labels"})
                if grads:
                    value = loss(out, batch) if loss else getattr(out, "loss", None)
                    if value is None:
                        raise DataError("This init needs gradients, but the calibration batch has no labels; add 'labels' to it.")
                    value.backward()
                    del value
                del out  # its graph, with this batch's activations, must not outlive the next forward
            if all(a.done() for a in accs.values()):
                break
    if not seen:
        raise DataError("calibration is empty; give at least one batch.")


@contextlib.contextmanager
def _watched(model: nn.Module, sites: Mapping[str, Site], accs: Mapping[str, Accumulator]) -> Iterator[list[Tensor | None]]:
    """Hooks registered, eval mode, base frozen; all restored afterwards."""
    box: list[Tensor | None] = [None]
    handles: list[Any] = []
    training = {m: m.training for m in model.modules()}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.eval()
    for p, _ in flags:
        p.requires_grad_(False)
    try:
        for name, acc in accs.items():
            handles += _hooks(sites[name], acc, box)
        yield box
    finally:
        for handle in handles:
            handle.remove()
        for m, mode in training.items():
            m.training = mode
        for p, flag in flags:
            p.requires_grad_(flag)


def _hooks(site: Site, acc: Accumulator, box: list[Tensor | None]) -> list[Any]:
    if site.spec.mode == "called":
        fn = _input_hook(site, acc, box) if acc.hook == "input" else _grad_hook(site, acc)
        return [site.module.register_forward_hook(fn, always_call=False)]
    if acc.hook == "input":
        raise AttachError(
            f"{site.name!r} is read by another forward, so its input cannot be seen; exclude it from this init's part."
        )
    return [_param_hook(site, acc)]


def _input_hook(site: Site, acc: Accumulator, box: list[Tensor | None]) -> Callable[..., None]:
    def seen(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if not acc.done():
            acc.update(_rows(site, args[0].detach(), box[0]))

    return seen


def _rows(site: Site, x: Tensor, mask: Tensor | None) -> Tensor:
    """The input as (n, in) rows of unmasked tokens; a conv's as its unfolded patches."""
    if site.spec.kind == "conv":
        return unfold(site, x)
    if mask is not None and x.shape[: mask.dim()] == mask.shape:
        return x[mask]
    if mask is not None and x.dim() == 2 and x.shape[0] == mask.numel():
        return x[mask.reshape(-1)]
    return x.reshape(-1, x.shape[-1])


def unfold(site: Site, x: Tensor) -> Tensor:
    """A conv's input as rows (positions, in/groups·k·k), first group only where there are several."""
    m: Any = site.module
    probe = torch.eye(site.spec.inp, dtype=x.dtype, device=x.device).reshape(site.spec.inp, -1, *m.kernel_size)
    x = x[:, : x.shape[1] // m.groups]
    fn = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[len(m.kernel_size) - 1]
    out = fn(x, probe, stride=m.stride, padding=m.padding, dilation=m.dilation)
    return out.flatten(2).transpose(1, 2).reshape(-1, site.spec.inp)


def _grad_hook(site: Site, acc: Accumulator) -> Callable[..., Tensor]:
    def seen(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        held = [args[0].detach()]  # popped when used, so that activations are freed as the backward goes, as autograd's are
        y = out if out.requires_grad else out + torch.zeros((), dtype=out.dtype, device=out.device, requires_grad=True)
        y.register_hook(lambda dy: acc.update(_weight_grad(site, held.pop(), dy.detach())))
        return y

    return seen


@torch.enable_grad()
def _weight_grad(site: Site, x: Tensor, dy: Tensor) -> Tensor:
    """∂L/∂W (fp32 out×in) of a called site from its input and its output's gradient."""
    if site.spec.kind == "linear":
        G = dy.reshape(-1, dy.shape[-1]).float().T @ x.reshape(-1, x.shape[-1]).float()
        rows = site.spec.row_index()
        return G if rows is None else G[rows.to(G.device)]
    W = torch.zeros(site.spec.shape, device=dy.device, requires_grad=True)
    y = site.op.linear(x.float() if x.is_floating_point() else x, W)
    return torch.autograd.grad(y, W, dy.float())[0]


def _param_hook(site: Site, acc: Accumulator) -> Any:
    """For a weight that another forward reads: take its gradient as it is accumulated, and drop it."""
    p = site.param
    if not isinstance(p, nn.Parameter) or not p.is_floating_point():
        raise AttachError(
            f"{site.name!r} has no floating-point weight whose gradient could be seen; exclude it from this init's part."
        )
    p.requires_grad_(True)

    def seen(param: Tensor) -> None:
        assert param.grad is not None
        acc.update(site.view(param.grad.float()))
        param.grad = None

    return p.register_post_accumulate_grad_hook(seen)


def _mask(batch: Mapping[str, Any], label_mask: bool) -> Tensor | None:
    """(B, T) bool of the tokens that count, or None."""
    mask: Tensor | None = None
    attention = batch.get("attention_mask")
    if isinstance(attention, Tensor) and attention.dim() == 2:
        mask = attention.bool()
    labels = batch.get("labels")
    if label_mask and isinstance(labels, Tensor) and labels.dim() == 2 and "decoder_input_ids" not in batch:
        counted = labels != -100
        mask = counted if mask is None else mask & counted if mask.shape == counted.shape else mask
    return mask
