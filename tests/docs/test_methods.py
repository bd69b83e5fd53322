"""docs/methods: every method has its section, the table is the catalogue's, no link dangles, and no private reference is left."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rankwise import catalogue
from rankwise.catalogue import MethodInfo
from rankwise.cli.info import PAGES
from tests.cli.tools import call

ROOT = Path(__file__).parents[2]
HOME = ROOT / "docs/methods"
#: folders whose files cite papers and these pages, and nothing that is not in the repository
CITING = ("src", "tests", "docs", "benchmarks", "examples")
#: what is left alone: what speaks of the cards of shipped models
EXEMPT = ("src/rankwise/assets/", "tests/assets/", "tests/docs/test_methods.py")
#: "card 123" and the like (a model's card is none of them), the private references' files, issues and rows of plans by number
PRIVATE = re.compile(r"(?<![a-z])(?<!model[ _])cards?(?![a-z])|methods/0|\bissue #?\d|\brow \d+", re.IGNORECASE)
#: what every section says, in this order; a policy has a rule in place of a formula
LABELS = (("Formula", "Rule"), ("Start and defaults", "Defaults"), ("Checked",), ("Source",), ("Departs",))

OWN = [m for m in catalogue.methods() if m.cls.__module__.partition(".")[0] == "rankwise"]
every_method = pytest.mark.parametrize("info", OWN, ids=lambda m: f"{m.kind}-{m.name}")


def sections(page: str) -> tuple[str, dict[str, str]]:
    """What stands before the first section of a page, and its sections by heading."""
    before, *parts = re.split(r"^## ", (HOME / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = dict(part.split("\n", 1) for part in parts)
    assert len(found) == len(parts), f"{page} has two sections of one name"
    return before, found


def as_written(value: Any) -> set[str]:
    """How a page may spell a default; empty where it may say it in words."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return set()
    return {"∞"} if value == float("inf") else {str(value), f"{value:g}", f"{value:.0e}".replace("e-0", "e-")}


@every_method
def test_every_method_has_its_section_with_all_that_it_is_built_from(info: MethodInfo) -> None:
    before, found = sections(PAGES[info.kind])
    assert info.name in found, f"docs/methods/{PAGES[info.kind]} has no section '## {info.name}'"
    text = found[info.name].strip()
    idea = text.split("\n- ")[0]
    assert len(idea) > 40 and not idea.startswith("- "), "a section begins with the idea"
    assert 7 <= len(text.splitlines()) <= 35
    said = re.findall(r"^- \*\*([^*]+)\*\*", text, re.MULTILINE)
    at = [next((i for i, s in enumerate(said) if s in names), -1) for names in LABELS]
    assert -1 not in at and at == sorted(at), f"{info.name} has {said}; a section has {LABELS} in this order"


@every_method
def test_every_option_is_told_with_its_default(info: MethodInfo) -> None:
    before, found = sections(PAGES[info.kind])
    mine = found[info.name]
    known = mine + (before if info.kind == "merge" else "")  # what many merges share is told once, above them
    assert not [o for o in info.options if not re.search(rf"\b{o}\b", known)]
    assert not [o for o, v in info.options.items() if as_written(v) and not any(w in mine for w in as_written(v))]


@every_method
def test_a_number_that_the_catalogue_gives_is_in_the_section(info: MethodInfo) -> None:
    """Page and catalogue name the same paper."""
    numbers = re.findall(r"\d{4}\.\d{5}", info.paper or "")
    assert all(n in sections(PAGES[info.kind])[1][info.name] for n in numbers)


def test_no_section_is_of_a_method_that_is_not_there() -> None:
    for page in sorted(set(PAGES.values())):
        mine = {m.name for m in OWN if PAGES[m.kind] == page}
        extra = {n for n in sections(page)[1] if n not in mine and not n.startswith("Built from: ")}
        assert not extra, f"docs/methods/{page}: {extra}"
    assert {p.name for p in HOME.iterdir()} == {"README.md", *PAGES.values()}


def test_the_table_is_the_catalogues(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = call(capsys, "methods", "--markdown")
    assert code == 0
    assert text == (HOME / "README.md").read_text(encoding="utf-8"), "docs/methods/README.md is not current; run `make docs`"
    rows = [line for line in text.splitlines() if line.startswith("| [")]
    assert len(rows) == len(OWN)


def test_pages_do_not_name_modules() -> None:
    """Methods are named; where they lie is the catalogue's affair."""
    named = [
        f"{p.name}: {m}" for p in HOME.glob("*.md") for m in re.findall(r"\brankwise\.\w+[\w.]*", p.read_text(encoding="utf-8"))
    ]
    assert not named


# --- links ----------------------------------------------------------------------------------------------------
def slug(heading: str) -> str:
    """The anchor that a heading has on the usual hosts."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {slug(h) for h in re.findall(r"^#+ +(.+)$", text, re.MULTILINE)} | set(re.findall(r'<a id="([^"]+)"', text))


def dangling(target: str, folder: Path, own: Path) -> str | None:
    """What is wrong with a relative link, or None."""
    path, _, anchor = target.partition("#")
    file = (folder / path).resolve() if path else own
    if not file.exists():
        return f"{target}: no such file"
    if anchor and file.suffix == ".md" and anchor not in anchors(file):
        return f"{target}: no such heading"
    return None


def test_the_check_of_links_sees_what_dangles() -> None:
    readme = HOME / "README.md"
    assert dangling("forms.md#lora", HOME, readme) is None and dangling("../serving.md", HOME, readme) is None
    assert dangling("serving.md#built-from-unified-paging", HOME, readme) is None
    assert "heading" in (dangling("forms.md#lorra", HOME, readme) or "") and "file" in (dangling("form.md", HOME, readme) or "")


@pytest.mark.parametrize("page", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))])
def test_no_link_dangles(page: str) -> None:
    file = ROOT / page
    text = re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text))
    relative = [t for t in links if not re.match(r"[a-z]+:", t)]
    assert not [wrong for t in relative if (wrong := dangling(t, file.parent, file))]


def texts(folder: str) -> Iterator[tuple[Path, str]]:
    for file in sorted((ROOT / folder).rglob("*")):
        if file.suffix in (".py", ".md", ".c", ".toml", ".yaml", ".yml"):
            yield file, file.read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", ["src", "tests", "docs", "benchmarks", "examples"])
def test_no_citation_of_these_pages_dangles(folder: str) -> None:
    """``docs/methods/<page>.md#<anchor>``, in code and tests too."""
    cited = [
        (file, target)
        for file, text in texts(folder)
        if file != Path(__file__)
        for target in re.findall(r"docs/methods/\w+\.md(?:#[\w-]+)?", text)
    ]
    assert not [f"{f.relative_to(ROOT)}: {wrong}" for f, t in cited if (wrong := dangling(t, ROOT, f))]


@pytest.mark.parametrize("line", ["see card 034", "its card's numbers", "CARD = 1", "methods/04", "issue #12", "Row 19: memory"])
def test_the_check_of_citations_sees_what_is_private(line: str) -> None:
    assert PRIVATE.search(line)
    assert not any(
        PRIVATE.search(s)
        for s in ("the model card", "write_model_card=False", "cardinality", "discards", "a row", "row i", "issues")
    )


@pytest.mark.parametrize("folder", CITING)
def test_nothing_cites_what_is_not_in_the_repository(folder: str) -> None:
    """A paper and its section, or a page of docs/methods, can be read by everybody; numbers of private lists cannot."""
    hits = [
        f"{file.relative_to(ROOT)}:{n}: {line.strip()[:100]}"
        for file, text in texts(folder)
        for n, line in enumerate(text.splitlines(), 1)
        if not str(file.relative_to(ROOT)).startswith(EXEMPT) and PRIVATE.search(line)
    ]
    assert not hits, "\n".join(hits)
