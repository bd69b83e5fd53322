"""The house: every module has a test, and no figure of its order is worse than its limit.

A limit is what has been reached.  Where one is passed, the test prints what passes it.
"""

from __future__ import annotations

import ast
import functools
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/rankwise"
TESTS = ROOT / "tests"
FILES = sorted(PACKAGE.rglob("*.py"))


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """All of a file's, read once for all figures."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def short(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


# --- every module has a test -----------------------------------------------------------------------------------
#: module without a test file of its name, whose names no test imports → the test file that reaches it another way, and why
ELSEWHERE: dict[str, tuple[str, str]] = {
    "_version.py": ("tests/test_project_files.py", "the number that CITATION.cff and CHANGELOG.md must have"),
    "assets/measure.py": ("tests/assets/test_assets.py", "bits per byte against the naive sum"),
    "assets/tokenizer.py": ("tests/assets/test_pretrain.py", "the tokenizer that a pretraining run trains"),
    "cli/compare.py": ("tests/cli/test_terminal.py", "rankwise compare, from text to the report"),
    "cli/demo.py": ("tests/test_wheel.py", "rankwise demo in an environment of its own (soak)"),
    "cli/merge_report.py": ("tests/cli/test_merge.py", "what rankwise merge prints and writes"),
    "cli/merge_score.py": ("tests/cli/test_merge.py", "merges chosen by held-out text"),
    "cli/sweep_picture.py": ("tests/cli/test_sweep.py", "the picture of a sweep"),
    "codecs/bridge.py": ("tests/codecs/test_library.py", "quantised layers of other libraries, found and read"),
    "codecs/bridge_bnb.py": ("tests/codecs/test_library.py", "layers of bitsandbytes, read and written back"),
    "codecs/bridge_torchao.py": ("tests/codecs/test_library.py", "tensors of torchao, read and written back"),
    "forms/block.py": ("tests/forms/test_bottleneck.py", "the form around a whole block"),
    "forms/svd.py": ("tests/budgets/test_adalora.py", "triplets and their masks; every law of tests/contract too"),
    "merge/engine/jobs.py": ("tests/merge/test_checkpoints.py", "whole models merged tensor by tensor"),
    "merge/judge/held_out.py": ("tests/cli/test_merge.py", "scores by held-out text and images"),
    "routers/blocks.py": ("tests/routers/test_mixlora.py", "experts over whole MLP blocks"),
    "routers/gates.py": ("tests/routers/test_mixlora.py", "gates with and without noise, their top k"),
    "runtime/build.py": ("tests/test_refusals.py", "recipes made into adapter layers, or refused"),
    "runtime/context.py": ("tests/test_view.py", "the view of a thread, and of calls inside calls"),
    "runtime/forward.py": ("tests/test_view.py", "rows, strengths and masks in one forward"),
    "runtime/install.py": ("tests/test_families.py", "hooks and classes set at attach and taken off at detach"),
    "runtime/module_state.py": ("tests/test_view.py", "adapters that act on one module"),
    "runtime/read.py": ("tests/test_families.py", "load: own files and PEFT's"),
    "runtime/record.py": ("tests/test_families.py", "what an attached adapter is known by"),
    "runtime/switch.py": ("tests/test_view.py", "rw.view and rw.activate"),
    "runtime/tensors.py": ("tests/serve/adapters/test_source.py", "tensors by name that a coded file refers to"),
    "serve/adapters/mix.py": ("tests/serve/adapters/test_cache.py", "mixes as one adapter"),
    "serve/adapters/read.py": ("tests/serve/adapters/test_source.py", "adapters in folders and files, or refused"),
    "serve/adapters/residency.py": ("tests/serve/test_engine.py", "adapters fetched, held and evicted while requests run"),
    "serve/adapters/values.py": ("tests/serve/adapters/test_kinds.py", "what an adapter changes, by kind"),
    "serve/engine/inbox.py": ("tests/serve/test_engine.py", "submit, cancel and call from other threads"),
    "serve/finetune/windowed_attention.py": ("tests/serve/test_windows.py", "attention over windows against attention over all"),
    "serve/http/admin.py": ("tests/serve/http/test_life.py", "adapters loaded and unloaded over HTTP"),
    "serve/http/events.py": ("tests/serve/http/test_stream.py", "server-sent events"),
    "serve/http/prompts.py": ("tests/serve/http/test_openai.py", "prompts as text, tokens and messages"),
    "serve/http/replies.py": ("tests/serve/http/test_openai.py", "the fields of every reply"),
    "serve/ops/cat.py": ("tests/serve/ops/test_ops.py", "one of the operators that must agree"),
    "serve/ops/reference.py": ("tests/serve/ops/test_ops.py", "the operator that the others must agree with"),
    "serve/ops/triton_kernels.py": ("tests/serve/ops/test_triton.py", "the kernels, in Triton's interpreter"),
    "store/coded.py": ("tests/serve/adapters/test_source.py", "files whose tensors a codec has packed"),
    "store/peft/config.py": ("tests/store/test_peft_read.py", "adapter_config.json, field by field"),
    "store/peft/pack.py": ("tests/store/test_peft_export.py", "adapters as PEFT's tensors"),
    "store/peft/read.py": ("tests/store/test_peft_read.py", "PEFT's folders, read or refused"),
    "cli/data_options.py": ("tests/cli/test_train.py", "options of data, of rankwise train and sweep"),
    "merge/engine/result.py": ("tests/merge/test_laws.py", "what every merge returns"),
    "recipe_spelling.py": ("tests/test_refusals.py", "PEFT's spellings in recipes, and what is refused of them"),
    "serve/adapters/host_tier.py": ("tests/serve/adapters/test_cache.py", "adapters kept in host memory and let go"),
    "serve/adapters/locks.py": ("tests/serve/adapters/test_source.py", "one reader of an adapter at a time"),
    "serve/engine/kv_cache_manager.py": ("tests/serve/test_engine.py", "blocks of requests that run, grow and are preempted"),
    "serve/finetune/recipes.py": ("tests/serve/test_train_stream.py", "recipes that cannot train beside serving, refused"),
    "serve/parallel/experimental/gloo.py": ("tests/serve/parallel/test_processes.py", "the group of real processes"),
    "serve/parallel/experimental/leader.py": ("tests/serve/parallel/test_engine.py", "an engine over several devices"),
    "store/peft/folder.py": ("tests/store/test_peft_read.py", "PEFT's folders found and opened"),
    "store/peft/info.py": ("tests/store/test_peft_read.py", "what a folder holds beside low-rank changes; a type alone"),
    "store/peft/keys.py": ("tests/store/test_peft_read.py", "every key of PEFT's files accounted for"),
    "train/arguments.py": ("tests/train/test_run.py", "TrainingArguments of rw.train"),
    "train/output.py": ("tests/train/test_run.py", "the files that a run leaves"),
}


def twin(path: Path, tests: set[str]) -> bool:
    """Whether some test file is named after the module: test_<name>.py or test_<name>_<what>.py."""
    name = f"test_{path.stem.lstrip('_')}"
    return any(t == name or t.startswith(f"{name}_") for t in tests)


def handed_on() -> dict[str, str]:
    """Name that a package's ``__init__`` takes from a module of its own → that module: rankwise.sites.Site → rankwise.sites.site."""
    return {
        f"{dotted(path)}.{alias.asname or alias.name}": node.module
        for path in FILES
        if path.stem == "__init__"
        for node in nodes(path)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("rankwise.")
        for alias in node.names
    }


def imported_by_tests() -> set[str]:
    """Modules that some test imports, or a name out of them, be it by way of their package."""
    found: set[str] = set()
    for test in TESTS.rglob("*.py"):
        for node in nodes(test):
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
            elif isinstance(node, ast.Import):
                found |= {a.name for a in node.names}
    return found | {module for name, module in handed_on().items() if name in found}


def untested() -> set[str]:
    tests, imported = {p.stem for p in TESTS.rglob("test_*.py")}, imported_by_tests()
    modules = [p for p in FILES if p.stem != "__init__"]
    return {short(p) for p in modules if not twin(p, tests) and dotted(p) not in imported}


def test_every_module_has_a_test() -> None:
    """A file of its name, one that imports it, or a line in the table that says which reaches it."""
    found = untested()
    assert not found - set(ELSEWHERE), f"no test: {sorted(found - set(ELSEWHERE))}"
    assert not set(ELSEWHERE) - found, f"have a test by now, or are gone; take out of the table: {sorted(set(ELSEWHERE) - found)}"
    for module, (file, reason) in ELSEWHERE.items():
        assert (ROOT / file).is_file() and len(reason) > 10, (module, file)


# --- figures ---------------------------------------------------------------------------------------------------
def lines(path: Path) -> int:
    return path.read_text(encoding="utf-8").count("\n")


def functions() -> Iterator[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in FILES:
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield path, node


def files_loose_in_serve() -> list[str]:
    return [short(p) for p in (PACKAGE / "serve").glob("*.py") if p.stem != "__init__"]


def long_files() -> list[str]:
    return [f"{short(p)}: {n} lines" for p in FILES if (n := lines(p)) > 350]


def long_functions() -> list[str]:
    return [f"{short(p)} {f.name}: {n}" for p, f in functions() if (n := (f.end_lineno or f.lineno) - f.lineno + 1) > 60]


def repeated_class_names() -> list[str]:
    found: dict[str, set[str]] = {}
    for path in FILES:
        for node in nodes(path):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, set()).add(short(path))
    return [f"{name}: {sorted(files)}" for name, files in sorted(found.items()) if len(files) > 1]


def unformatted_lines() -> list[str]:
    return [f"{short(p)}: {n}" for p in FILES for n in range(p.read_text(encoding="utf-8").count("# fmt: skip"))]


def late_imports() -> list[str]:
    """Of the package's own modules, inside functions; the command line's keep ``--help`` quick."""
    found = set()
    for path, function in functions():
        for node in ast.walk(function):
            names = (
                [node.module]
                if isinstance(node, ast.ImportFrom)
                else [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            found |= {f"{short(path)}:{node.lineno} {n}" for n in names if n and n.startswith("rankwise")}  # type: ignore[attr-defined]
    return sorted(f for f in found if not f.startswith("cli/"))


def thread_locals() -> list[str]:
    return [
        f"{short(path)}:{node.lineno}"
        for path in FILES
        for node in nodes(path)
        if isinstance(node, ast.Attribute)
        and node.attr == "local"
        and isinstance(node.value, ast.Name)
        and node.value.id == "threading"
    ]


def serving_lines() -> list[str]:
    return ["a line"] * sum(lines(p) for p in (PACKAGE / "serve").rglob("*.py") if "simulate" not in p.parts)


def wide_layers() -> list[str]:
    """Layers of more than four modules that may not import one another: a floor, and no longer an order."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    layers = [(c["name"], layer) for c in contracts if c["type"] == "layers" for layer in c["layers"]]
    assert layers, "no contract has layers"
    return [f"{name}: {layer}" for name, layer in layers if len(re.split(r"[:|]", layer)) > 4]


def importing() -> dict[str, set[str]]:
    """Module → modules that it imports when it runs, below the command line."""
    graph = grimp.build_graph("rankwise", cache_dir=None, exclude_type_checking_imports=True)
    below = {m for m in graph.modules if m != "rankwise" and not m.startswith("rankwise.cli")}
    return {m: graph.find_modules_directly_imported_by(m) & below for m in below}


def circles(graph: dict[str, set[str]]) -> dict[str, str]:
    """Module → the name of the circle of imports that it is in (its own, where it is in none), by Tarjan's way."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    circle: dict[str, str] = {}
    stack: list[str] = []

    def visit(m: str) -> None:
        index[m] = low[m] = len(index)
        stack.append(m)
        for n in sorted(graph[m]):
            if n not in index:
                visit(n)
                low[m] = min(low[m], low[n])
            elif n not in circle:
                low[m] = min(low[m], index[n])
        if low[m] == index[m]:
            while True:
                n = stack.pop()
                circle[n] = m
                if n == m:
                    break

    for m in sorted(graph):
        if m not in index:
            visit(m)
    return circle


def longest_chain(graph: dict[str, set[str]]) -> list[str]:
    """Modules of which each imports the next, one of each circle, as many as there can be."""
    circle = circles(graph)
    contracted: dict[str, set[str]] = {c: set() for c in circle.values()}
    for m, imported in graph.items():
        contracted[circle[m]] |= {circle[n] for n in imported} - {circle[m]}
    chains: dict[str, list[str]] = {}

    def chain(c: str) -> list[str]:
        if c not in chains:
            chains[c] = [c, *max((chain(n) for n in sorted(contracted[c])), key=len, default=[])]
        return chains[c]

    return max((chain(c) for c in sorted(contracted)), key=len)


def deep_chain() -> list[str]:
    return longest_chain(importing())


FIGURES: list[tuple[Callable[[], list[str]], int]] = [
    (files_loose_in_serve, 5), (long_files, 0), (long_functions, 0), (repeated_class_names, 10), (unformatted_lines, 40), (late_imports, 30),
    (deep_chain, 13), (thread_locals, 3), (wide_layers, 0), (serving_lines, 13_250),
]  # fmt: skip
# thread_locals: the context of a forward; beside it, what is no context: a switch of forms/fused.py, a cache of forms/input_group.py


@pytest.mark.parametrize(("found", "limit"), FIGURES, ids=[f.__name__ for f, _ in FIGURES])
def test_no_figure_is_worse_than_its_limit(found: Callable[[], list[str]], limit: int) -> None:
    now = found()
    assert len(now) <= limit, f"{len(now)}, not {limit} or fewer:\n" + "\n".join(dict.fromkeys(now))


def test_the_chain_is_found_and_circles_count_once() -> None:
    assert longest_chain({"a": {"b", "c"}, "b": {"c"}, "c": {"d"}, "d": set(), "e": {"d"}}) == ["a", "b", "c", "d"]
    round_ = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": {"e"}, "e": {"d"}}
    assert len(longest_chain(round_)) == 3 and len(set(circles(round_).values())) == 3
    assert longest_chain({m: set() for m in "ab"}) == ["a"]


def test_each_figure_sees_what_it_counts() -> None:
    """None of them is empty for looking in the wrong place."""
    assert len(FILES) > 300 and len(list(functions())) > 3000
    assert "rankwise.runtime.view" in importing() and len(serving_lines()) > 8000 and len(deep_chain()) > 5
    assert {"serve/server.py", "serve/types.py"} <= set(files_loose_in_serve())
