"""PEFT's `adapter_config.json`: what each key means to the numbers, which are read, and which are refused by name.

Pattern semantics (PEFT 0.21): a key of ``rank_pattern`` or ``alpha_pattern`` is a regex that matches
``(.*\\.)?KEY$`` against the module path, first match in order wins; an entry of a ``target_modules`` list matches a
whole trailing sequence of name segments; a string is a regex over the full path.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from rankwise.errors import ArtefactError
from rankwise.store.tensorfile import strict_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MAX_CONFIG = 4 << 20
MAX_RANK = 4096

#: keys that are used here
_USED = frozenset({
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "bias", "rank_pattern", "alpha_pattern",
    "target_modules", "exclude_modules", "target_parameters", "modules_to_save", "layers_to_transform", "layers_pattern",
    "fan_in_fan_out", "init_lora_weights",
})  # fmt: skip
#: keys that say nothing about what the saved numbers compute; never followed, whatever they name
_NOTES = frozenset({
    "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "lora_dropout",
    "eva_config", "corda_config", "lora_ga_config", "loftq_config", "megatron_core", "qalora_group_size", "runtime_config",
})  # fmt: skip
#: keys that change what is computed in a way this reader does not know
_MEANINGS = {
    "layer_replication": "the base's layers are repeated before the adapter is put in",
    "megatron_config": "the adapter is sharded for Megatron",
    "trainable_token_indices": "single rows of an embedding are replaced",
    "alora_invocation_tokens": "the adapter acts only after its invocation tokens (activated LoRA)",
    "use_qalora": "the input is pooled in groups before A (QALoRA)",
    "use_bdlora": "A or B is block-diagonal (BD-LoRA)",
    "arrow_config": "a router chooses among several adapters (Arrow)",
    "kasa_config": "the base is truncated and a diagonal stands between A and B (KaSA)",
    "monteclora_config": "the factors are drawn from a learned distribution (MonteCLoRA)",
    "velora_config": "activations are compressed in training (VeLoRA)",
    "ensure_weight_tying": "tied modules are made to share one adapter",
}
_RESIDUAL = ("pissa", "olora", "corda", "lora_ga", "loftq")
#: keys that do not enter the digest, so that a moved base does not look like damage
_FREE = frozenset(
    {"base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version", "lora_dropout"}
)


def parse_config(raw: bytes, where: str) -> dict[str, Any]:
    """The checked LoRA config; keys that are absent have PEFT's defaults.

    Raises:
        ArtefactError: not JSON, another PEFT type, a value of the wrong sort, or a key that changes the numbers in a
            way that is not supported.
    """
    config = strict_json(raw, where)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ArtefactError(
            f"{where}: peft_type is {str(kind)[:40]!r}; this reader knows LORA. Convert it with PEFT's convert_to_lora first."
        )
    for key, value in config.items():
        if key in _USED or key in _NOTES or _neutral(value):
            continue
        meaning = _MEANINGS.get(key)
        if meaning:
            raise ArtefactError(f"{where}: {key} is set: {meaning}. rankwise cannot read such an adapter.")
        raise ArtefactError(
            f"{where}: unknown key {key[:60]!r} with a value that may change the result; rankwise refuses to guess."
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_RESIDUAL):
        raise ArtefactError(
            f"{where}: init_lora_weights is {init!r}: these factors are valid only on the changed base of that run. Save it "
            "in PEFT with path_initial_model_for_weight_conversion, which gives a plain LoRA, and read that."
        )
    return _checked(config, where)


def _checked(config: dict[str, Any], where: str) -> dict[str, Any]:
    out: dict[str, Any] = {
        "r": 8, "lora_alpha": 8, "use_rslora": False, "use_dora": False, "lora_bias": False, "bias": "none", "rank_pattern": {},
        "alpha_pattern": {}, "target_modules": None, "exclude_modules": None, "target_parameters": None, "modules_to_save": None,
        "layers_to_transform": None, "layers_pattern": None, "fan_in_fan_out": False,
    }  # fmt: skip
    out |= {k: v for k, v in config.items() if v is not None or out.get(k) is None}

    def need(ok: bool, key: str, what: str) -> None:
        if not ok:
            raise ArtefactError(f"{where}: {key} must be {what}, not {str(config.get(key))[:60]!r}.")

    need(_rank(out["r"]), "r", f"an integer from 1 to {MAX_RANK}")
    need(_finite(out["lora_alpha"]), "lora_alpha", "a finite number other than 0")
    for key in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"):
        need(isinstance(out[key], bool), key, "true or false")
    need(out["bias"] in ("none", "all", "lora_only"), "bias", "none, all or lora_only")
    for key, good in (("rank_pattern", _rank), ("alpha_pattern", _finite)):
        need(isinstance(out[key], dict) and all(good(v) for v in out[key].values()), key, "a map of patterns to such numbers")
    for key in ("target_modules", "exclude_modules"):
        need(out[key] is None or isinstance(out[key], str) or _strings(out[key]), key, "a list of names or one pattern")
    for key in ("target_parameters", "modules_to_save"):
        need(out[key] is None or _strings(out[key]), key, "a list of names")
    layers = out["layers_to_transform"]
    layers = [layers] if type(layers) is int else layers
    need(
        layers is None or (isinstance(layers, list) and all(type(v) is int for v in layers)),
        "layers_to_transform",
        "a list of integers",
    )
    out["layers_to_transform"] = layers
    pattern = out["layers_pattern"]
    need(pattern is None or isinstance(pattern, str) or _strings(pattern), "layers_pattern", "a name or a list of names")
    out["layers_pattern"] = [pattern] if isinstance(pattern, str) and pattern else (pattern or [])
    for regex in [*out["rank_pattern"], *out["alpha_pattern"], *out["layers_pattern"], *_regexes(out)]:
        _harmless(regex, where)
    return out


def scale_of(config: Mapping[str, Any], key: str) -> tuple[int, float]:
    """(rank, scale) that the config gives the module path (or parameter path) ``key``."""
    r = lookup(config["rank_pattern"], key, config["r"])
    alpha = lookup(config["alpha_pattern"], key, config["lora_alpha"])
    return r, alpha / (math.sqrt(r) if config["use_rslora"] else r)


def lookup(patterns: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value of the first pattern that matches ``key``."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", key):
            return value
    return default


def targeted(config: Mapping[str, Any], modules: Iterable[str]) -> set[str]:
    """Which of the module paths the config's targets match (``all-linear`` is the caller's affair)."""
    began, out = time.monotonic(), set()
    for module in modules:
        if _matches(config, module):
            out.add(module)
        if time.monotonic() - began > 2.0:
            raise ArtefactError("The config's patterns take too long to match; rankwise refuses them.")
    return out


def ends_with(name: str, entry: str) -> bool:
    """Whether ``entry`` is ``name`` or a whole trailing sequence of its segments."""
    return name == entry or name.endswith("." + entry)


def _matches(config: Mapping[str, Any], module: str) -> bool:
    exclude, targets = config["exclude_modules"], config["target_modules"]
    if isinstance(exclude, str) and exclude and re.fullmatch(exclude, module):
        return False
    if isinstance(exclude, list) and any(ends_with(module, e) for e in exclude):
        return False
    if any(f".{saved}." in f".{module}." for saved in config["modules_to_save"] or ()):
        return False
    if isinstance(targets, str):
        return bool(re.fullmatch(targets, module))
    if module in (targets or ()):
        return True
    if not any(ends_with(module, t) for t in targets or ()):
        return False
    layers = config["layers_to_transform"]
    if not layers:
        return True
    patterns = config["layers_pattern"]
    found = None
    for regex in [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns] or [r".*?\.[^.]*\.(\d+)\."]:
        found = re.match(regex, module)
        if found:
            break
    return found is not None and int(found.group(1)) in layers


def suffixes(targets: Collection[str], modules: Collection[str] | None) -> list[str]:
    """The shortest sorted list of trailing names that matches exactly ``targets`` among all ``modules``.

    Without ``modules`` the full paths are given: they are always exact.
    """
    if not modules:
        return sorted(targets)
    everywhere: dict[str, int] = {}
    for module in set(modules) | set(targets):
        for tail in _tails(module):
            everywhere[tail] = everywhere.get(tail, 0) + 1
    here: dict[str, int] = {}
    for module in targets:
        for tail in _tails(module):
            here[tail] = here.get(tail, 0) + 1
    return sorted({next(tail for tail in _tails(t) if everywhere[tail] == here[tail]) for t in targets})


def _tails(name: str) -> list[str]:
    """``["c", "b.c", "a.b.c"]`` for ``a.b.c``."""
    parts = name.split(".")
    return [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]


def patterns_of(values: Mapping[str, int], default: int) -> dict[str, int]:
    """A ``rank_pattern`` that gives each path its value: full paths, the longest first, so none hides another."""
    special = {k for k, v in values.items() if v != default}
    hidden = {k for k in values if any(k != s and ends_with(k, s) for s in special)}  # a short path ends a longer one
    for quote in (lambda k: k if re.fullmatch(r"[\w.]*", k) else re.escape(k), re.escape):
        out = {quote(k): values[k] for k in sorted(special | hidden, key=lambda k: (-len(k), k))}
        if all(lookup(out, k, default) == v for k, v in values.items()):
            return out
    raise ArtefactError("The modules' names cannot be told apart by PEFT's patterns.")


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """Deterministic JSON; the order of patterns is kept, for the first match wins."""
    return (json.dumps(dict(sorted(config.items())), indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def config_salt(config: Mapping[str, Any]) -> str:
    """The part of a config that decides the numbers, as canonical JSON: the salt of the pair's digest."""
    kept = {k: v for k, v in config.items() if k not in _FREE and not _neutral(v)}
    return json.dumps(kept, sort_keys=True, separators=(",", ":")) + json.dumps([*kept.get("rank_pattern", {})])


def _regexes(config: Mapping[str, Any]) -> list[str]:
    return [v for v in (config["target_modules"], config["exclude_modules"]) if isinstance(v, str)]


def _harmless(regex: str, where: str) -> None:
    """Refuse patterns that are no regex, or that could take for ever."""
    why = ""
    try:
        re.compile(regex)
    except (re.error, RecursionError, OverflowError) as e:
        why = f"is not a pattern ({e})"
    plain = re.sub(r"\\.|\[[^\]]*\]", "x", regex)
    if len(regex) > 20_000 or len(re.findall(r"[*+]|\{", plain)) > 6:
        why = why or "is too complex"
    stack: list[bool] = []
    for i, char in enumerate(plain):  # a repeated group that itself repeats or branches can backtrack without end
        if char == "(":
            stack.append(False)
        elif char == ")" and stack:
            inner = stack.pop()
            repeated = plain[i + 1 : i + 2] in ("*", "+", "{")
            if inner and repeated:
                why = why or "repeats a group that repeats or branches"
            if stack:
                stack[-1] |= inner or repeated
        elif char in "*+{|" and stack:
            stack[-1] = True
    if why:
        raise ArtefactError(f"{where}: the pattern {regex[:60]!r} {why}.")


def _rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value) and value != 0


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) and v for v in value)


def _neutral(value: Any) -> bool:
    return value is None or value is False or value == {} or value == [] or value == ""
