"""Old spellings of public names work, with one deprecation line that names the new one."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from pathlib import Path
from typing import ClassVar

import pytest

import rankwise as rw
from rankwise import _renamed
from rankwise.forms import base
from tests.models import llama


@pytest.mark.parametrize("old", sorted(_renamed.MODULES))
def test_old_modules_are_found(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("attach", "view"):  # importing the old module of that name binds it over the function
        monkeypatch.setattr(rw, name, getattr(rw, name))
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {_renamed.MODULES[old][0]}"):
        module = importlib.import_module(old)
    assert callable(rw.attach) and callable(rw.view)
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_the_kind'"):
        _ = module.nothing_of_the_kind


def test_names_of_old_modules_are_the_new_ones() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from rankwise.files import load
        from rankwise.merge.oracle import Oracle
        from rankwise.roster import Roster, roster_of
    from rankwise.merge import Evaluator
    from rankwise.runtime.registry import AdapterRegistry, registry_of

    assert (load, Oracle, Roster, roster_of) == (rw.load, Evaluator, AdapterRegistry, registry_of)


@pytest.mark.parametrize(
    ("module", "old"),
    [("forms.base", "SiteDelta"), ("forms.base", "Bank"), ("forms.lora", "Pair"), ("forms.dora", "Magnitude"), ("merge", "Oracle")],
)
def test_old_classes_are_the_new_ones(module: str, old: str) -> None:
    found = importlib.import_module(f"rankwise.{module}")
    with pytest.warns(DeprecationWarning, match=f"{old} is now .*{_renamed.NAMES[old]}"):
        assert getattr(found, old) is getattr(found, _renamed.NAMES[old])
    assert not hasattr(found, "NothingOfTheKind")


def test_a_form_that_says_gives_provides() -> None:
    with pytest.warns(DeprecationWarning, match=r"Old\.gives is now .*Old\.provides"):

        class Old(base.Form):
            gives: ClassVar[frozenset[str]] = frozenset({"pair"})

    assert Old.provides == {"pair"}  # type: ignore[attr-defined]
    with pytest.warns(DeprecationWarning, match="requires"):
        rw.register("form", "nothing", title="", needs=("pair",))


def test_the_field_untie_and_the_method_effective() -> None:
    with pytest.warns(DeprecationWarning, match="'untie' is now 'separate_tied'"):
        recipe = rw.Recipe(targets=["embed_tokens"], untie=True, r=2)
    assert recipe.separate_tied and recipe.to_json() == {"targets": ["embed_tokens"], "separate_tied": True, "r": 2}
    adapter = rw.attach(llama(tie=True), recipe)
    (layer,) = adapter.sites.values()
    with pytest.warns(DeprecationWarning, match="total_delta"):
        layer.effective()


def test_files_with_old_fields_are_read_without_a_word(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        assert rw.Recipe.from_json({"untie": True, "parts": [{"untie": True}]}).parts[0].separate_tied


def test_nothing_of_ours_uses_an_old_spelling() -> None:
    """Importing every module that needs no optional library, with these warnings as errors, is silent."""
    script = (
        "import warnings; warnings.filterwarnings('error', message='.*the old spelling goes.*')\n"
        "import rankwise as rw; rw.methods(); rw.Recipe; rw.train; rw.Session"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
