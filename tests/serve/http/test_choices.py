"""One answer from its tokens: what goes out when, with which log-probabilities, and how it ends."""

from __future__ import annotations

import pytest

from rankwise.errors import RankwiseError
from rankwise.serve.http.choices import OutputDelta, OutputStream
from rankwise.serve.http.detokenise import Detokeniser
from rankwise.serve.http.errors import status_of
from rankwise.serve.types import AdapterRefused, Finished, Outcome, Token
from tests.serve.http.live import base

END = 1


def run(
    text: str, stops: tuple[str, ...] = (), cut: int | None = None, outcome: Outcome = Outcome.LENGTH
) -> tuple[OutputStream, list[OutputDelta]]:
    """The pieces of a text's tokens, the last ``cut`` of them left out."""
    d = Detokeniser(base()[1])
    ids = base()[1](text, add_special_tokens=False)["input_ids"][: None if cut is None else -cut]
    choice, pieces = OutputStream(0, d, (5,), stops, frozenset({END})), []
    for i, t in enumerate([*ids, *([END] if outcome is Outcome.STOP else [])]):
        pieces.append(choice.token(Token("r", t, i, -0.5, ((t, -0.5),))))
        if pieces[-1].finish:
            return choice, pieces
    pieces.append(choice.finished(Finished("r", outcome, 1, len(ids), 7)))
    return choice, pieces


def text_of(pieces: list[OutputDelta]) -> str:
    return "".join(p.text for p in pieces)


def test_an_answer_cut_within_a_character_shows_that_it_was() -> None:
    choice, pieces = run("ab🙂", cut=1)
    assert text_of(pieces) == "ab�"
    assert (choice.outcome, pieces[-1].finish, choice.reused) == (Outcome.LENGTH, "length", 7)


def test_every_token_is_logged_once_and_in_order() -> None:
    for text in ("def f(x):\n    return x", "é日本🙂"):
        choice, pieces = run(text, outcome=Outcome.STOP)
        raw = b"".join(e.raw for p in pieces for e in p.logged)
        assert raw.decode() == text == text_of(pieces)
        offsets = [e.offset for p in pieces for e in p.logged]
        assert offsets == sorted(offsets)
        assert choice.generated == len(offsets) + 1, "the end of text is counted and not logged"


def test_tokens_behind_a_stop_string_are_not_logged() -> None:
    choice, pieces = run("one two three four", stops=(" three",))
    assert text_of(pieces) == "one two"
    assert b"".join(e.raw for p in pieces for e in p.logged).decode() == "one two"
    assert choice.outcome is Outcome.STOP


def test_a_stop_string_that_only_the_last_character_completes() -> None:
    _, pieces = run("ab🙂", stops=("b�",), cut=1)
    assert (text_of(pieces), pieces[-1].finish) == ("a", "stop")


def test_what_waited_for_a_stop_string_goes_out_at_the_end() -> None:
    _, pieces = run("one tw", stops=("two",))
    assert text_of(pieces) == "one tw"


@pytest.mark.parametrize(
    ("outcome", "error", "status"),
    [
        (Outcome.ERROR, None, 500), (Outcome.CANCELLED, None, 503), (Outcome.ABORTED, None, 504), (Outcome.REJECTED, None, 429),
        (Outcome.REJECTED, AdapterRefused("no"), 400),
    ],
)  # fmt: skip
def test_how_a_request_can_fail(outcome: Outcome, error: RankwiseError | None, status: int) -> None:
    choice = OutputStream(0, Detokeniser(base()[1]), (5,), (), frozenset())
    with pytest.raises(RankwiseError) as caught:
        choice.finished(Finished("r", outcome, 1, 0, message="secret" if status == 500 else "", error=error))
    assert status_of(caught.value) == status
    assert "secret" not in str(caught.value)
    assert choice.outcome is outcome
