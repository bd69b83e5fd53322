"""Several models that decode one text together: views of one model, and other models of the same vocabulary.

Adapters of one base share its weights: a decoding model is ``(model, view)``, and only its key-value cache is its own.  The same
:class:`Fusion` scores whole texts (:meth:`Fusion.logits`), decodes greedily by itself (:meth:`Fusion.generate`), and stands in
transformers' ``model.generate`` as a logits processor (:meth:`Fusion.processor`), before temperature and top-p.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import rankwise.catalogue as catalogue
from rankwise._renamed import renamed_argument, warn
from rankwise.decoding.combine import LogitCombiner, Term
from rankwise.errors import DataError, MergeError, OptionError, unknown
from rankwise.runtime.switch import view as view_of


@dataclasses.dataclass(frozen=True, eq=False)
class DecodingModel:
    """A causal language model under a view.

    Attributes:
        view: adapter → strength, ``{}`` for the base; None: as the model stands when it is called.
        tokenizer: where given, vocabularies are compared token by token, and padding beyond them may differ.
    """

    model: nn.Module
    view: Mapping[str, float] | None = None
    tokenizer: Any = None

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor, cache: Any = None, keep: bool = True) -> tuple[Tensor, Any]:
        """Logits (B, t, V) of the last t = ids.shape[1] tokens of ``mask`` (B, T), and the cache after them.

        Args:
            ids: the new tokens (B, t).
            mask: of all tokens (B, T), 1 where one counts.
            cache: of the tokens before; None: there are none.
            keep: give a cache back.
        """
        positions = (mask.long().cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        extra = {"position_ids": positions} if "position_ids" in inspect.signature(self.model.forward).parameters else {}
        device = next(self.model.parameters()).device
        acting = contextlib.nullcontext() if self.view is None else view_of(self.model, self.view)
        with acting:
            out = self.model(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                past_key_values=cache,
                use_cache=keep,
                **_moved(extra, device),
            )
        return out.logits, getattr(out, "past_key_values", None)

    @property
    def width(self) -> int:
        """Length of its logits."""
        config: Any = self.model.config
        return int(getattr(config, "get_text_config", lambda: config)().vocab_size)


class Fusion:
    """Models whose logits are combined at each step, the target among them; the terms; a combiner.

    Args:
        models: name → model.
        terms: w·(expert − anti), by models' names; a term of weight 0 is never run.
        method: a combiner of the catalogue ("static", "dynamic") with its ``options``, or one of your own.
        target: the model that is steered.

    Raises:
        UnknownName: a term that names no model.
        MergeError: vocabularies that differ.
        OptionError: a wrong option, or terms that the combiner cannot follow.
    """

    @renamed_argument("voices", "models")
    def __init__(
        self,
        models: Mapping[str, DecodingModel],
        terms: Sequence[Term],
        method: str | LogitCombiner = "dynamic",
        *,
        target: str = "base",
        **options: Any,
    ) -> None:
        for name in (target, *(n for t in terms for n in (t.expert, t.anti))):
            if name not in models:
                raise unknown("decoding model", name, models)
        if options and not isinstance(method, str):
            raise OptionError(
                f"The combiner is given whole, so {sorted(options)} would say nothing; give its name, or set them in it."
            )
        self.combiner: LogitCombiner = catalogue.make("logits", method, **options) if isinstance(method, str) else method
        self.terms, self.target = [t for t in terms if t.weight != 0], target
        if self.terms:
            self.combiner.check(self.terms)
        used = {target, *(n for t in self.terms for n in (t.expert, t.anti))}
        self.models = {n: v for n, v in models.items() if n in used}
        _one_vocabulary(models, target)

    @classmethod
    def of_adapters(
        cls, model: nn.Module, experts: Mapping[str, float], method: str | LogitCombiner = "dynamic", **options: Any
    ) -> Fusion:
        """Adapters of one model as experts, its untouched base as their anti-expert and as the target.

        Args:
            model: with the adapters attached.
            experts: adapter → weight.
            method: a combiner's name, or one of your own.
            options: of the combiner.
        """
        models = {"base": DecodingModel(model, {} if experts else None)} | {
            f"adapter {n}": DecodingModel(model, {n: 1.0}) for n in experts
        }
        return cls(models, [Term(f"adapter {n}", w, "base") for n, w in experts.items()], method, **options)

    @property
    def voices(self) -> dict[str, DecodingModel]:
        """The old spelling of ``models``."""
        warn("Fusion.voices", "Fusion.models")
        return self.models

    def combine(self, logits: Mapping[str, Tensor]) -> Tensor:
        """{model: (…, V)} → (…, V), in the target's dtype and width; what lies beyond the common vocabulary is −∞."""
        mine = logits[self.target]
        least = min(t.shape[-1] for t in logits.values())
        fused = self.combiner({n: t[..., :least].to(mine.device) for n, t in logits.items()}, self.target, self.terms)
        return nn.functional.pad(fused, (0, mine.shape[-1] - least), value=-torch.inf)

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Fused logits of every position of whole texts: ids (B, T) → (B, T, V); without caches."""
        mask = _mask(input_ids, attention_mask)
        return self.combine({n: v.forward(input_ids, mask, keep=False)[0] for n, v in self.models.items()})

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, max_new_tokens: int, eos_token_id: int | None = None
    ) -> Tensor:
        """Greedy: ids (B, T) → (B, T + n), n ≤ ``max_new_tokens``; a row that met ``eos_token_id`` repeats it.  Pads on the left.

        Args:
            input_ids: the prompts (B, T).
            attention_mask: (B, T), 0 where padded; default no padding.
            max_new_tokens: n at the most.
            eos_token_id: ends a row; None: none does.
        """
        stream, mask, ids = DecodingStream(self.models), _mask(input_ids, attention_mask), input_ids
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for _ in range(max_new_tokens):
            new = self.combine(stream.step(ids, mask)).argmax(-1).to(ids.device)
            if eos_token_id is not None:
                new = new.masked_fill(done, eos_token_id)
                done = done | (new == eos_token_id)
            ids, mask = torch.cat([ids, new[:, None]], 1), torch.cat([mask, mask.new_ones(len(ids), 1)], 1)
            if bool(done.all()):
                break
        return ids

    def processor(self, attention_mask: Tensor | None = None) -> FusionProcessor:
        """A ``LogitsProcessor`` for one ``generate`` of the target's model, called inside :meth:`acting`.

        ``attention_mask`` is the prompt's, where it is padded (on the left).
        """
        return FusionProcessor(self, attention_mask)

    @contextlib.contextmanager
    def acting(self) -> Iterator[None]:
        """The target's view, for the ``generate`` that takes :meth:`processor`."""
        steered = self.models[self.target]
        with contextlib.nullcontext() if steered.view is None else view_of(steered.model, steered.view):
            yield


class DecodingStream:
    """Models that follow one growing text, each with its own cache."""

    def __init__(self, models: Mapping[str, DecodingModel]) -> None:
        self.models = models
        self.caches: dict[str, Any] = {}
        self.seen: Tensor | None = None

    def step(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """{model: logits (B, V)} of the next token after ids (B, T); only what is new is run.

        A text that does not go on from the last one (reordered beams, another prompt) is read anew: no stale cache is used.
        """
        old = self.seen
        goes_on = old is not None and ids.shape[1] > old.shape[1] and torch.equal(ids[:, : old.shape[1]], old)
        if not goes_on:
            self.caches = {}
        found = {}
        for name, model in self.models.items():
            cache = self.caches.get(name)
            fresh = ids if cache is None or old is None else ids[:, old.shape[1] :]
            logits, self.caches[name] = model.forward(fresh, mask, cache)
            found[name] = logits[:, -1]
        self.seen = ids.clone()
        return found


class FusionProcessor:
    """What ``generate`` calls with (ids, scores): the target's logits are its scores, the other models run beside it.

    The first call also runs the target, and refuses scores that are not its logits: under another view, with another padding,
    or after a processor that changes more than which tokens are allowed (a repetition penalty belongs after the fusion).
    Log-probabilities, as beam search hands them, come back as log-probabilities.
    """

    def __init__(self, fusion: Fusion, attention_mask: Tensor | None = None) -> None:
        self.fusion, self.mask = fusion, attention_mask
        self.stream = DecodingStream({n: v for n, v in fusion.models.items() if n != fusion.target})
        self.checked = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        fusion = self.fusion
        if not fusion.terms:
            return scores
        mask = self._mask(input_ids)
        if not self.checked:
            _same(fusion.models[fusion.target].forward(input_ids, mask, keep=False)[0][:, -1], scores)
            self.checked = True
        fused = fusion.combine(self.stream.step(input_ids, mask) | {fusion.target: scores})
        normal = bool((scores.double().logsumexp(-1).abs() < 1e-4).all())
        return fused.log_softmax(-1) if normal else fused

    def _mask(self, ids: Tensor) -> Tensor:
        given = torch.ones_like(ids[:, :0]) if self.mask is None else self.mask.to(ids.device).long()
        if given.shape[1] > ids.shape[1] or len(ids) % len(given):
            raise DataError(f"The attention mask is {tuple(given.shape)}, but the texts are {tuple(ids.shape)}; give the prompt's.")
        given = given.repeat_interleave(len(ids) // len(given), 0)  # several beams or samples a prompt
        return torch.cat([given, given.new_ones(len(ids), ids.shape[1] - given.shape[1])], 1)


def _same(logits: Tensor, scores: Tensor) -> None:
    """Refuse scores that are not the logits, up to a constant a row and tokens that were excluded."""
    off = torch.where(scores.isfinite(), scores.double() - logits.to(scores.device).double(), torch.nan)
    spread = float(logits.double().amax() - logits.double().amin())
    gap = float((off - off.nanmean(-1, keepdim=True)).abs().nan_to_num(0.0).max())
    if gap > spread * (1e-3 if logits.dtype == torch.float32 else 5e-2):
        raise DataError(
            f"generate's scores are not the target's logits (they differ by {gap:.3g}): call it inside fusion.acting(), give the padded "
            "prompt's attention_mask to fusion.processor(), and put what changes scores (a repetition penalty) after it in logits_processor."
        )


def _moved(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {n: t.to(device) for n, t in tensors.items()}


def _mask(ids: Tensor, given: Tensor | None) -> Tensor:
    """(B, T) of 0 and 1; one that is given must fit and be padded on the left, where the next token does not see it."""
    if given is None:
        return torch.ones_like(ids)
    if given.shape != ids.shape:
        raise DataError(f"The attention mask is {tuple(given.shape)} for ids of {tuple(ids.shape)}; give one entry for each token.")
    return given.long()


def _one_vocabulary(models: Mapping[str, DecodingModel], target: str) -> None:
    """Refuse models whose tokens differ from the target's: by their tokenizers where both are given, else by their number."""
    mine = models[target]
    for name, other in models.items():
        if other.model is mine.model:
            continue
        if other.tokenizer is not None and mine.tokenizer is not None:
            a, b = mine.tokenizer.get_vocab(), other.tokenizer.get_vocab()
            if a != b:
                odd = sorted(t for t in {*a, *b} if a.get(t) != b.get(t))
                raise MergeError(
                    f"The model {name!r} does not share the vocabulary of {target!r}: {len(odd)} tokens differ, the first {odd[0]!r} "
                    f"({b.get(odd[0])} and {a.get(odd[0])}). Logits are combined token by token; use models of one tokenizer."
                )
        elif other.width != mine.width:
            raise MergeError(
                f"The model {name!r} has {other.width:,} logits and {target!r} {mine.width:,}: not one vocabulary. If only its padding "
                "differs, give both tokenizers, which are then compared."
            )
