"""Text tasks made at run time from the running Python's own source: nothing to download, nothing the base has read.

Language modelling of a held-out domain, a summary of a function from its signature, the package a snippet is from,
and preferences between two summaries.  ``python -m rankwise.assets.tasks --out DIR`` writes them all as JSON lines.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from rankwise.assets import corpus
from rankwise.assets.measure import bits_per_byte as bits_per_byte  # the score of the domains, handed on
from rankwise.seeds import generator

Record = dict[str, str]
_SUMMARY_LENGTHS = range(12, 101)


def domains() -> dict[str, tuple[list[str], list[str]]]:
    """Name -> (train texts, test texts) of each held-out domain, split by whole document (see `corpus.HELD_OUT`)."""
    out = {}
    for name in corpus.HELD_OUT:
        documents = corpus.domain_documents(name)
        train, test = corpus.split(documents)
        out[name] = ([documents[key] for key in train], [documents[key] for key in test])
    return out


def _functions(source: str) -> Iterator[tuple[str, str]]:
    """(signature, docstring's first line) of every documented function of a file, in the order of the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in the library's own strings
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
            kind = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
            yields = f" -> {ast.unparse(node.returns)}" if node.returns else ""
            yield f"{kind} {node.name}({ast.unparse(node.args)}){yields}", text.split("\n", 1)[0].strip()


def _summaries(sources: Iterable[str]) -> dict[str, str]:
    """Signature -> summary; a signature's first summary counts, and summaries of odd length are no summaries."""
    found: dict[str, str] = {}
    for source in sources:
        for signature, summary in _functions(source):
            if len(summary) in _SUMMARY_LENGTHS:
                found.setdefault(signature, summary)
    return found


def _instruction(signature: str) -> str:
    return f"### Function\n{signature}\n### Summary\n"


def docstring_task() -> tuple[list[Record], list[Record]]:
    """(train, test) records ``{"prompt": signature, "completion": first line of its docstring}``.

    Train functions come from the files that the base has read (in another form: code, not instructions), test
    functions from the held-out packages; a signature that occurs in both is left to train.
    """
    train, test = (
        [{"prompt": _instruction(signature), "completion": summary} for signature, summary in part.items()]
        for part in _docstring_parts()
    )
    return train, test


@functools.cache
def _docstring_parts() -> tuple[dict[str, str], dict[str, str]]:
    """Signature -> summary for train and test; parsing the whole library takes seconds, so once a process."""
    train = _summaries(corpus.read(name) for name in corpus.pretraining_files())
    held = [text for name in corpus.HELD_OUT if name != "prose" for text in corpus.domain_documents(name).values()]
    return train, {key: text for key, text in _summaries(held).items() if key not in train}


def _snippets(text: str, lines: int = 8) -> Iterator[str]:
    kept = [line for line in text.split("\n") if line.strip()]
    for start in range(0, len(kept) - lines + 1, lines):
        yield "\n".join(line[:100] for line in kept[start : start + lines])


def package_task(per_domain: int = 200, seed: int = 0) -> tuple[list[Record], list[Record]]:
    """(train, test) records ``{"prompt": eight lines, "completion": domain's name}``: classification, balanced.

    At most ``per_domain`` train and a quarter as many test records a domain, drawn by ``seed`` from documents that
    train and test do not share, and shuffled.
    """
    parts: tuple[list[Record], list[Record]] = ([], [])
    for name, sides in domains().items():
        for side, texts in enumerate(sides):
            found = [snippet for text in texts for snippet in _snippets(text)]
            order = torch.randperm(len(found), generator=generator(seed, "package_task", f"{name} {side}"))
            for i in order[: per_domain if side == 0 else per_domain // 4].tolist():
                prompt = f"### Code\n{found[i]}\n### Package\n"
                parts[side].append({"prompt": prompt, "completion": name})
    train, test = (
        [part[i] for i in torch.randperm(len(part), generator=generator(seed, "package_task", f"shuffle {side}"))]
        for side, part in enumerate(parts)
    )
    return train, test


def preference_task(seed: int = 0) -> tuple[list[Record], list[Record]]:
    """(train, test) records ``{"prompt", "chosen", "rejected"}``: a function's own summary against another one's."""

    def pairs(records: list[Record], side: str) -> list[Record]:
        order = torch.randperm(len(records), generator=generator(seed, "preference_task", side)).tolist()
        other = {a: records[b]["completion"] for a, b in zip(order, order[1:] + order[:1])}
        return [
            {"prompt": record["prompt"], "chosen": record["completion"], "rejected": other[i]}
            for i, record in enumerate(records)
            if other[i] != record["completion"]
        ]

    train, test = docstring_task()
    return pairs(train, "train"), pairs(test, "test")


def write_tasks(folder: Path) -> dict[str, int]:
    """Writes ``NAME.train.jsonl`` and ``NAME.test.jsonl`` of every task; file name -> number of records."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks: dict[str, tuple[list[Record], list[Record]]] = {
        f"domain-{name}": ([{"text": t} for t in train], [{"text": t} for t in test]) for name, (train, test) in domains().items()
    }
    tasks |= {"docstring": docstring_task(), "package": package_task(), "preference": preference_task()}
    counts = {}
    for name, sides in tasks.items():
        for part, records in zip(("train", "test"), sides):
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
            (folder / f"{name}.{part}.jsonl").write_text("".join(lines), encoding="utf-8")
            counts[f"{name}.{part}.jsonl"] = len(records)
    return counts


def main(argv: list[str] | None = None) -> None:
    line = argparse.ArgumentParser(prog="python -m rankwise.assets.tasks", description=__doc__)
    line.add_argument("--out", type=Path, required=True, help="folder for the JSON-lines files")
    for name, count in write_tasks(line.parse_args(argv).out).items():
        print(f"{count:6d}  {name}")


if __name__ == "__main__":
    main()
