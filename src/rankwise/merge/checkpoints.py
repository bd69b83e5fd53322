"""Whole models merged folder to folder: one tensor of every source at a time, memory-mapped, written once.

A :class:`~rankwise.merge.engine.model_folder.Checkpoint` is a folder's table of tensors; here they are matched, by name and
shape, and what does not match is refused or dealt with as told; :mod:`~rankwise.merge.engine.jobs` runs and writes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rankwise.errors import MergeError, Option, OptionError
from rankwise.merge.engine.base import Merge, given_weights, one_of, rule_of
from rankwise.merge.engine.jobs import CheckpointReport, Read, Shards, TensorJob, by_tensor, write
from rankwise.merge.engine.model_folder import EMBEDDING, HEAD, Checkpoint

if TYPE_CHECKING:
    from rankwise.merge.judge.model_soups import Models


def merge_checkpoints(
    folders: Sequence[str | Path],
    out: str | Path,
    method: str | Merge = "average",
    weights: Sequence[float] | None = None,
    base: str | Path | None = None,
    *,
    on: str | None = None,
    missing: str | None = None,
    vocabulary: str = "refuse",
    untie: bool = False,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5 * 10**9,
    seed: int = 0,
    force: bool = False,
    progress: Callable[[str], None] = lambda name: None,
    models: Models | None = None,
    **options: Any,
) -> CheckpointReport:
    """Merge whole models, tensor by tensor, into the new folder ``out``.

    Args:
        folders: Hugging Face folders of safetensors, in shards or not.
        out: the new folder.
        method: a registered merge of whole models, or its name with ``options``.
        weights: one a source; default 1/T each.
        base: what changes are measured from; required where the method works on "changes".
        on: "changes" or "weights" where it should not be the method's own.
        missing: a tensor that only some have: "refuse", "copy" it from the base or the first that has it, take the "first" source's
            for those without it, or count it as unchanged there ("zero": changes only); default the method's own.
        vocabulary: embeddings of other lengths: "refuse", or "base": cut or filled to the base's (or first's) rows.
        untie: allow sources of which only some tie their embeddings; the result is untied.
        dtype: of the result; default each tensor's in the base, or in the first.  Sums are fp32 (fp64 for fp64).
        shard_bytes: of one file of the result at the most; default 5 GB.
        seed: of random draws.
        progress: called with each tensor's name when it is done.
        force: keep a result that equals its base.
        models: what a soup is judged by.

    Raises:
        OptionError: a method that takes no whole models, or needs a base that was not given.
        MergeError: tensors that do not fit, integers that differ, values that are not finite, a result equal to its base.
        ArtefactError: a folder that cannot be read or written.
    """
    rule = rule_of(method, options, len(folders))
    on = _checked(rule, on, base, untie, models)
    chosen = given_weights(rule, weights, len(folders))
    sources = _Sources.open(rule, folders, base, Aligned(missing or rule.missing, vocabulary, on))
    changes = {"tie_word_embeddings": False} if same_ties(sources.everyone, untie) else {}
    rule.check(sources.names())
    used, found = dict.fromkeys(sources.names(), chosen), None
    jobs = sources.jobs(used)  # what does not fit is told before anything is judged
    if rule.finds_weights:
        used, found = sources.found_weights(models)
        jobs = sources.jobs(used)
    written: dict[str, Any] = {"method": rule.info.name, "seed": seed, "force": force, "progress": progress}
    report = write(jobs, out, sources.everyone[0], changes, Shards(dtype, shard_bytes), **written)
    if found is not None and models is not None:
        report.weights, report.score = found, models.told(out)
    return report


def _checked(rule: Merge, on: str | None, base: str | Path | None, untie: bool, models: Models | None) -> str:
    """What the rule works on, "changes" or "weights"; refuses what a merge of whole models by it cannot be."""
    name = rule.info.name
    if not rule.checkpoints:
        raise OptionError(f"The merge {name!r} takes adapters, not whole models; for models use 'average' or 'task_arithmetic'.")
    on = on or rule.works_on
    one_of(name, "on", on, ("changes", "weights"))
    if not isinstance(untie, bool):
        raise OptionError(f"untie is true or false; it got {untie!r}.")
    if on == "changes" and base is None:
        raise OptionError(
            f"The merge {name!r} works on changes from a base model; give the folder of that base: ", Option("base", ...), "."
        )
    if rule.needs_evaluator and (models is None or not rule.finds_weights):
        raise OptionError(
            f"The merge {name!r} is judged by held-out data; give models=Models(…) (rankwise.merge.judge.model_soups)."
            if rule.finds_weights
            else f"The merge {name!r} finds what it asks a score for on adapters alone; for whole models name it with an option."
        )
    return on


def same_ties(checkpoints: Sequence[Checkpoint], untie: bool) -> bool:
    """Whether the result is untied by ``untie``; refuses a mixture without it, and gives tied sources their head's name with it."""
    if len({c.tied for c in checkpoints}) == 1:
        return False
    head = next((h for c in checkpoints if not c.tied and (h := c.first(HEAD))), None)
    if not untie or head is None:
        which = {c.folder.name: "tied" if c.tied else "untied" for c in checkpoints}
        raise MergeError(
            f"Some of these models tie their output to the embedding and some do not: {which}; the option untie=true merges both ends."
        )
    for c in checkpoints:
        if c.tied and (embedding := c.first(EMBEDDING)):
            c.table[head] = c.table[embedding]
            c.alias[head] = embedding
    return True


Place = tuple[Checkpoint, str]


@dataclasses.dataclass(frozen=True)
class Aligned:
    """What to do with tensors that do not match; makes the jobs."""

    missing: str = "refuse"
    vocabulary: str = "refuse"
    on: str = "weights"

    def __post_init__(self) -> None:
        for option, among in (("missing", ("refuse", "copy", "first", "zero")), ("vocabulary", ("refuse", "base"))):
            if getattr(self, option) not in among:
                raise OptionError(f"{option} is one of {', '.join(among)}; it got {getattr(self, option)!r}.")
        if self.missing == "zero" and self.on != "changes":
            raise OptionError("missing=zero counts a source as unchanged, which needs a method that works on changes.")

    def job(
        self, name: str, sources: Sequence[Place], base: Place | None, rule: Merge | None, weights: Sequence[float]
    ) -> TensorJob:
        """The job of one tensor of the result from each source's (checkpoint, its name there).

        Args:
            name: of the tensor in the result.
            sources: each source's checkpoint and its name there.
            base: likewise of the base; None: there is none.
            rule: the merge; None: the first is copied.
            weights: one a source.
        """
        have = [(c, n) for c, n in [*([base] if base else []), *sources] if n in c.table]
        if not have:
            raise MergeError(f"No source has {name!r}.")
        lead, original = have[0]
        shape, dtype = lead.shape(original), lead.dtype(original)
        lacking = [c.folder.name for c, n in [*([base] if base else []), *sources] if n not in c.table]
        if lacking and self.missing == "refuse":
            raise MergeError(
                f"{', '.join(sorted(set(lacking)))} has no {name!r}, which {lead.folder.name} has; the option missing=copy takes it over unmerged."
            )
        copy = bool(lacking) and (self.missing == "copy" or (base is not None and base[1] not in base[0].table))
        if not dtype.is_floating_point:  # nothing to average, whoever lacks it
            return TensorJob(name, shape, dtype, tuple(self._reader(c, n, shape, lead, original) for c, n in have), (), None)
        if copy or rule is None:
            return TensorJob(name, shape, dtype, (self._reader(lead, original, shape, lead, original),), (1.0,), None)
        held = [(c, n) if n in c.table else None for c, n in sources]
        if self.missing == "first":
            if held[0] is None:
                raise MergeError(f"{sources[0][0].folder.name}, the first source, has no {name!r} to take for those without it.")
            held = [h or held[0] for h in held]
        readers = tuple(self._reader(*h, shape, lead, original) if h is not None else None for h in held)
        origin = self._reader(base[0], base[1], shape, lead, original) if base else None
        return TensorJob(name, shape, dtype, readers, tuple(weights), rule, self.on, origin)

    def _reader(self, c: Checkpoint, name: str, shape: tuple[int, ...], lead: Checkpoint, original: str) -> Read:
        mine = c.shape(name)
        if mine == shape:
            return lambda: c.read(name)
        resized = mine[1:] == shape[1:] and mine[0] == c.vocabulary and shape[0] == lead.vocabulary
        if not resized or self.vocabulary == "refuse":
            why = (
                "their vocabularies differ; the option vocabulary=base keeps the rows of the first, if token numbers mean the same"
                if resized
                else "they are of different architectures"
            )
            raise MergeError(f"{name!r} is {_say(mine)} in {c.folder.name} and {_say(shape)} in {lead.folder.name}: {why}.")
        return lambda: torch.cat([c.read(name)[: shape[0]], lead.read(original)[mine[0] :].to(c.dtype(name))])


@dataclasses.dataclass(frozen=True)
class _Sources:
    """The models to be merged, and how what does not match is dealt with."""

    rule: Merge
    models: list[Checkpoint]
    base: Checkpoint | None
    aligned: Aligned

    @classmethod
    def open(cls, rule: Merge, folders: Sequence[str | Path], base: str | Path | None, aligned: Aligned) -> _Sources:
        """Args as the fields, the models by their folders."""
        return cls(rule, [Checkpoint(f) for f in folders], Checkpoint(base) if base is not None else None, aligned)

    @property
    def everyone(self) -> list[Checkpoint]:
        """The base first, where there is one."""
        return [*([self.base] if self.base else []), *self.models]

    def names(self) -> list[str]:
        """Of all tensors, in the order of the first that has them."""
        return list(dict.fromkeys(n for c in self.everyone for n in c.table))

    def jobs(self, weights: Mapping[str, Sequence[float]]) -> list[TensorJob]:
        """One a tensor, from {its name: one weight a source}."""
        base = self.base
        triples = [(n, [(c, n) for c in self.models], (base, n) if base else None) for n in self.names()]
        return [self.aligned.job(n, mine, origin, self.rule, weights[n]) for n, mine, origin in triples]

    def found_weights(self, judged: Any) -> tuple[dict[str, tuple[float, ...]], Any]:
        """The weights of each tensor that the rule finds with the judged models, and the same as the report has them."""
        found, names = self.rule.weigh_models(judged), self.names()
        if not isinstance(found, Mapping):
            return dict.fromkeys(names, tuple(found.tolist())), found.tolist()
        used = by_tensor(found, names, len(self.models))
        return used, {n: list(w) for n, w in used.items()}


def _say(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
