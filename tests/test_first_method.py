"""docs/first_method.md: the plug-in of the page is built, installed and used as printed, in processes of its own."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

PAGE = (Path(__file__).parents[1] / "docs/first_method.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
(PYPROJECT,) = [text for language, text in BLOCKS if language == "toml"]
FORM, MERGE, USE = [text for language, text in BLOCKS if language == "python"]
INSTALL, SHELL, LAWS = [text for language, text in BLOCKS if language == "bash"]


def lines_of_code(source: str) -> int:
    """Lines that hold code: no blank lines, comments, imports or docstrings."""
    tree = ast.parse(source)
    left_out: set[int] = set()
    for node in ast.walk(tree):
        document = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if isinstance(node, (ast.Import, ast.ImportFrom)) or document:
            left_out |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    empty = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in empty:
            held |= set(range(token.start[0], token.end[0] + 1))
    return len(held - left_out)


def test_the_counting_counts() -> None:
    assert (
        lines_of_code('"""Doc."""\nimport os\n\n# why\nx = (\n    1\n)\n\n\ndef f():\n    """Doc\n    doc."""\n    return x\n') == 5
    )


def test_twelve_lines_and_one() -> None:
    assert PAGE.startswith("# Your first form in 12 lines, your first merge in one\n")
    assert (lines_of_code(FORM), lines_of_code(MERGE)) == (12, 1)


@pytest.mark.parametrize("source", [FORM, MERGE], ids=["form", "merge"])
def test_no_line_is_two(source: str, tmp_path: Path) -> None:
    """The blocks are laid out by the package's own rules, so that the count is of honest lines."""
    (tmp_path / "block.py").write_text(source, encoding="utf-8")
    for rules in (["format", "--check"], ["check", "--select", "E,F,I"]):
        command = [sys.executable, "-m", "ruff", *rules, "--isolated", "--line-length", "132", "block.py"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


#: runs what it is told, a JSON list of commands, as a shell and its python would, but in one process: most of the time is imports
ONE_PROCESS = """
import json, os, runpy, shlex, sys
import pytest
from rankwise.cli.main import main
os.environ["COLUMNS"] = "200"
for folder, text in json.load(sys.stdin):
    os.chdir(folder)
    for command in map(shlex.split, text.splitlines()):
        try:
            if command[0] == "rankwise":
                code = main(command[1:])
            elif command[:3] == ["python", "-m", "pytest"]:
                code = pytest.main(command[3:])
            else:
                code = runpy.run_path(command[1], run_name="__main__") and 0
        except SystemExit as left:
            code = left.code
        if code:
            sys.exit(f"{command}: {code}")
    print("\\0", end="", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["one", pytest.param("each its own", marks=pytest.mark.soak)])
def test_the_page_runs(processes: str, tmp_path: Path) -> None:
    """Installed as printed; then every command, in one process or as a shell runs them."""
    project, work, installed = tmp_path / "project", tmp_path / "work", tmp_path / "installed"
    project.mkdir(), work.mkdir()
    for name, text in {"pyproject.toml": PYPROJECT, "my_form.py": FORM, "my_merge.py": MERGE}.items():
        (project / name).write_text(text, encoding="utf-8")
    (work / "use.py").write_text(USE, encoding="utf-8")
    tools = str(Path(sys.executable).parent)  # where rankwise and pip of this environment are
    assert (Path(tools) / "rankwise").exists(), "the environment holds no rankwise command; make .venv/.installed"
    paths = [str(installed), *filter(None, [os.environ.get("PYTHONPATH")])]
    paths = [os.path.abspath(p) for path in paths for p in path.split(os.pathsep)]
    env = os.environ | {"PATH": tools + os.pathsep + os.environ["PATH"], "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"}

    def run(command: list[str], folder: Path, given: str | None = None) -> str:
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240, input=given)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def shell(text: str, folder: Path = work) -> str:
        return run(["bash", "-euo", "pipefail", "-c", text], folder)

    install, *listing = INSTALL.splitlines()
    assert install.endswith(" .")  # as printed, but beside this environment, not in it
    shell(install.replace("pip install", f"python -m pip install --quiet --target '{installed}'", 1), project)
    assert list(installed.glob("my_adapters-*.dist-info/entry_points.txt"))
    repository = Path(__file__).parents[1]
    steps = [(work, "\n".join(listing)), (work, "python use.py"), (work, SHELL), (repository, LAWS)]
    if processes == "one":
        given = json.dumps([(str(folder), text) for folder, text in steps])
        listed, used, merged, checked, end = run([sys.executable, "-c", ONE_PROCESS], work, given).split("\0")
        assert not end
    else:
        listed, used, merged, checked = (shell(text, folder) for folder, text in steps)
    assert "lora_fa · form" in listed and "ΔW = s·B·A" in listed and "equal_norm · merge" in listed
    assert "['form lora_fa', 'merge equal_norm']" in used
    for name in ("verse", "code"):
        losses = [float(loss) for loss in re.findall(rf"^{name} \d+: (\d+\.\d+)$", used, re.MULTILINE)]
        assert len(losses) == 12 and losses[-1] < 0.75 * losses[0], losses
        tensors = load_file(work / "run" / name / "rankwise.safetensors")
        drawn, trained = ({k: t for k, t in tensors.items() if k.endswith(end)} for end in ("A", "B"))
        assert len(drawn) == len(trained) > 0 and all(t.any() for t in trained.values()), "not every B has moved"
    first, second = (load_file(work / "run" / name / "rankwise.safetensors") for name in ("verse", "code"))
    assert all(torch.equal(first[k], second[k]) for k in first if k.endswith("A")), (
        "a frozen A has moved, or its draw is not seeded"
    )

    told = " ".join(merged.split())
    assert "wrote run/both: 42 places, rank 16" in told and "equal_norm: 0 lost by cutting to a rank" in told
    assert "logits before and after differ by" in told
    assert (work / "run/both/rankwise.safetensors").stat().st_size > 10_000 and (work / "run/whole/model.safetensors").exists()

    assert (found := re.search(r"(\d+) passed", checked)) and int(found[1]) >= 30 and "failed" not in checked, checked[-2000:]


def test_a_rule_of_the_table_is_the_equal_norm_mean() -> None:
    """What the page says of its merge: every source counts by direction, at the mean norm."""
    from rankwise.delta import AdapterState, LowRank
    from rankwise.merge import merge_states

    names: dict[str, object] = {}
    exec(compile(MERGE.replace('"equal_norm"', '"equal_norm_of_the_page"'), "docs/first_method.md", "exec"), names)
    try:
        g = torch.Generator().manual_seed(0)
        a, b = (LowRank(torch.randn(2, 5, generator=g), torch.randn(7, 2, generator=g) * k) for k in (1.0, 10.0))
        got = merge_states([AdapterState({"x": d}) for d in (a, b)], method="equal_norm_of_the_page").sites["x"].dense()
        n = [d.dense().norm() for d in (a, b)]
        expected = sum(0.5 * d.dense() * (sum(n) / 2) / size for d, size in zip((a, b), n, strict=True))
        assert torch.allclose(got, expected, atol=1e-5)
    finally:
        from rankwise import catalogue

        del catalogue._methods["merge", "equal_norm_of_the_page"]
