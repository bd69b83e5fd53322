"""What a contributor meets first: the pages beside the code are valid, and say what is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import rankwise
import rankwise as rw
from rankwise import catalogue
from rankwise.delta import AdapterState, LowRank
from rankwise.errors import OptionError
from rankwise.merge import merge_states

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted(p for p in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if p.stem != "config")
PAGES = [ROOT / n for n in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs/first_method.md")]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def read(path: str | Path) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


# --- citation ---------------------------------------------------------------------------------------------------
def test_the_citation_is_valid_and_of_this_version() -> None:
    cff = read("CITATION.cff")
    assert cff["cff-version"] == "1.2.0" and cff["type"] == "software" and cff["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= set(cff)  # what the format demands
    allowed = {"abstract", "authors", "cff-version", "commit", "contact", "date-released", "doi", "identifiers", "keywords", "license",
               "license-url", "message", "preferred-citation", "references", "repository", "repository-artifact", "repository-code",
               "title", "type", "url", "version"}  # fmt: skip
    assert set(cff) <= allowed, set(cff) - allowed
    assert cff["authors"] and all(set(a) == {"name"} or {"family-names"} <= set(a) for a in cff["authors"])
    assert str(cff["version"]) == rankwise.__version__, "CITATION.cff is of another version than the package"
    assert cff["keywords"] == list(dict.fromkeys(cff["keywords"])) and all(isinstance(k, str) for k in cff["keywords"])


def test_the_changelog_has_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[([^\]]+)\]", text, re.MULTILINE)
    assert headings[0] == "Unreleased" and rankwise.__version__ in headings
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert all(re.search(rf"^\[{re.escape(h)}\]: https://", text, re.MULTILINE) for h in headings)


# --- workflows --------------------------------------------------------------------------------------------------
def schema(name: str, files: list[Path]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", name, *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["vendor.github-workflows", "custom.github-workflows-require-timeout"])
def test_workflows_fit_their_schema(name: str, tmp_path: Path) -> None:
    assert [p.name for p in WORKFLOWS] == ["lint.yml", "tests.yml", "wheel.yml"]
    done = schema(name, WORKFLOWS)
    assert done.returncode == 0, done.stdout + done.stderr
    bad = tmp_path / "bad.yml"
    bad.write_text(WORKFLOWS[0].read_text().replace("timeout-minutes", "timeout-minuets"))
    assert schema(name, [bad]).returncode == 1, "the schema passes anything"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflows_say_that_they_never_ran_and_run_what_there_is(path: Path, tmp_path: Path) -> None:
    assert path.read_text().startswith("# Linted (") and "never yet run" in path.read_text().splitlines()[0]
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]) if "uses" in step else step["run"]
            script = step.get("run", "")
            done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            for target in re.findall(r"^make (\S+)", script, re.MULTILINE):
                assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target


def test_the_matrix_is_what_the_package_promises() -> None:
    (job,) = read(".github/workflows/tests.yml")["jobs"].values()
    assert job["strategy"]["matrix"] == {"os": ["ubuntu-latest", "macos-latest"], "python": ["3.11", "3.12", "3.13"]}
    assert 'requires-python = ">=3.11"' in (ROOT / "pyproject.toml").read_text()


# --- forms and hooks --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", FORMS, ids=lambda p: p.stem)
def test_issue_forms(path: Path) -> None:
    form = read(path)
    assert set(form) <= {"name", "description", "title", "labels", "body", "assignees", "projects", "type"}
    assert form["name"] and form["description"] and any(b["type"] != "markdown" for b in form["body"])
    seen = [b["id"] for b in form["body"] if "id" in b]
    assert len(seen) == len(set(seen))
    for block in form["body"]:
        kind, says = block["type"], block["attributes"]
        assert kind in {"markdown", "textarea", "input", "dropdown", "checkboxes"}
        assert says["value"] if kind == "markdown" else says["label"] and block["id"]
        assert kind not in ("dropdown", "checkboxes") or says["options"]
        assert set(says) <= {"value", "label", "description", "placeholder", "render", "options", "multiple", "default"}


def test_the_form_for_methods_offers_every_kind() -> None:
    (kinds,) = [b["attributes"]["options"] for b in read(".github/ISSUE_TEMPLATE/method.yml")["body"] if b["type"] == "dropdown"]
    assert set(kinds) == set(catalogue.FOLDERS)


def test_hooks_are_pinned_and_there() -> None:
    config = ROOT / ".pre-commit-config.yaml"
    done = subprocess.run([sys.executable, "-m", "pre_commit", "validate-config", str(config)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    repos = read(config)["repos"]
    assert all(re.fullmatch(r"v\d+\.\d+\.\d+", r["rev"]) for r in repos if r["repo"] != "local")
    hooks = {h["id"]: h for r in repos for h in r["hooks"]}
    assert {"ruff-check", "ruff-format", "floors", "mypy", "workflows"} <= set(hooks)
    programs = {h["entry"].split()[0] for r in repos if r["repo"] == "local" for h in r["hooks"]}
    assert programs == {f".venv/bin/{n}" for n in ("lint-imports", "mypy", "check-jsonschema")}
    assert all(f"$(VENV)/bin/{Path(p).name}" in MAKEFILE for p in programs), "make lint and the hooks part ways"


# --- pages ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_what_a_page_points_at_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [t.split("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in t]
    named = re.findall(r"(?<![\w/.-])((?:docs|tests|examples|\.github)/[\w./-]*\w(?:/|\.\w+))(?![\w/])", text)
    made = ("tests/forms/test_NAME.py",)
    missing = [t for t in links if not (page.parent / t).exists()] + [n for n in named if n not in made and not (ROOT / n).exists()]
    assert not missing, missing
    for target in re.findall(r"`(?:\w+=\S+ )*make (\w+)`", text):
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target


def test_ci_lints_and_tests() -> None:
    assert re.findall(r"^make .*", (ROOT / ".ci/run").read_text(), re.MULTILINE) == ["make lint", "make test"]


def test_the_errors_that_the_page_shows() -> None:
    shown = re.findall(r"^> (.+)$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    source = AdapterState({"x": LowRank(torch.ones(1, 2), torch.ones(2, 1))})
    with pytest.raises(OptionError) as first:
        merge_states([source] * 3, method="slerp")
    layer = nn.Module()
    layer.q_proj = nn.Linear(256, 256)
    model = nn.Module()
    model.layers = nn.ModuleList([layer])
    with pytest.raises(OptionError) as second:
        rw.attach(model, rw.Recipe(form="lora", r=512))
    assert [str(e.value) for e in (first, second)] == shown


def test_no_code_of_a_model_is_run() -> None:
    """SECURITY.md: trust_remote_code is off, and nothing turns it on."""
    sources = list((ROOT / "src/rankwise").rglob("*.py"))
    assert len(sources) > 100 and not [p for p in sources if "trust_remote_code" in p.read_text(encoding="utf-8")]
