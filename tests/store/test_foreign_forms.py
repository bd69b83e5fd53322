"""Forms say which tensors of other libraries' files they take, so that reading names none of them."""

from __future__ import annotations

import pytest
import torch

from rankwise.catalogue import find
from rankwise.errors import OptionError
from rankwise.forms import foreign as base


@pytest.mark.parametrize(
    ("held", "name"), [(("A", "B"), "lora"), (("B", "A"), "lora"), (("A", "B", "magnitude"), "dora"), (("difference",), "dense")]
)
def test_what_a_file_holds_finds_its_form(held: tuple[str, ...], name: str) -> None:
    assert base.foreign_form(*held).name == name


def test_tensors_get_the_names_of_a_native_file() -> None:
    A, B, m = (torch.zeros(i + 1) for i in range(3))
    got = base.foreign_form("A", "B", "magnitude").at("layer", {"A": A, "B": B, "magnitude": m})
    assert {k: v is t for (k, v), t in zip(got.items(), (A, B, m), strict=True)} == dict.fromkeys(
        ("layer::inner.A", "layer::inner.B", "layer::m"), True
    )


def test_what_no_form_takes_is_refused() -> None:
    with pytest.raises(OptionError, match="No form takes A, phase"):
        base.foreign_form("A", "phase")


def test_two_forms_for_the_same_are_refused() -> None:
    base.foreign_form("A", "B")
    with pytest.raises(OptionError, match="'lora' takes"):
        base.takes_foreign(A="A", B="B")(find("form", "dense").cls)  # type: ignore[arg-type]
    assert base.foreign_form("A", "B").name == "lora"
