"""From token ids to text as they come: a character is never split, and a possible beginning of a stop string is held back."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from functools import cache
from typing import Any

REPLACEMENT = "�"
#: tokens of the prompt looked back at where a tokenizer's decoder needs neighbours
LOOK_BACK = 6
#: tokens that wait for a character to become whole; more are no character (one has four bytes), and go out as they are
PATIENCE = 16


class Detokeniser:
    """Text of one tokenizer's ids; special tokens have none."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.special = frozenset(tokenizer.all_special_ids)
        self.exact = _is_byte_level(tokenizer)
        self._vocabulary = len(tokenizer)

    def stream(self, prompt: Sequence[int] = ()) -> _Bytes | _Window:
        """A new sequence after ``prompt``, whose last tokens decide whether a first blank is kept."""
        return _Bytes(self) if self.exact else _Window(self, prompt)

    def text(self, ids: Sequence[int]) -> str:
        """The text of whole ids, as ``stream`` would give it."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def raw(self, token: int) -> bytes:
        """The bytes of one token, also of a special one or of a part of a character."""
        name = self.tokenizer.convert_ids_to_tokens(token) if token < self._vocabulary else None
        if name is None:
            return b""
        if token in self.special or name in getattr(self.tokenizer, "added_tokens_encoder", {}):
            return str(name).encode()
        if self.exact:
            return bytes(_byte_of()[c] for c in name)
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes([int(name[3:5], 16)])
        return str(name).replace("▁", " ").encode()


class _Bytes:
    """Byte-level vocabularies: text is the concatenation of the tokens' bytes, so decoding them one by one is exact.

    Not tokenizers' DecodeStream: it has no end (:meth:`flush`), keeps bytes that are no character for ever, and the bytes of
    a token are wanted anyway (:meth:`Detokeniser.raw`).
    """

    def __init__(self, owner: Detokeniser):
        self.owner = owner
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return "" if token in self.owner.special else self.decoder.decode(self.owner.raw(token))

    def flush(self) -> str:
        return self.decoder.decode(b"", final=True)


class _Window:
    """Any other tokenizer: the difference of two decodings that share their beginning, which is a whole character's.

    DecodeStream does the same, and raises where a run of byte tokens turns out to be no character.
    """

    def __init__(self, owner: Detokeniser, prompt: Sequence[int]):
        self.owner = owner
        self.ids = [i for i in prompt if i not in owner.special][-LOOK_BACK:]
        while self.ids and owner.text(self.ids).startswith(REPLACEMENT):
            self.ids.pop(0)
        self.read = len(self.ids)

    def push(self, token: int) -> str:
        if token in self.owner.special:
            return ""
        self.ids.append(token)
        return self._advance(final=len(self.ids) - self.read > PATIENCE)

    def flush(self) -> str:
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        old, new = self.owner.text(self.ids[: self.read]), self.owner.text(self.ids)
        if not final and new.endswith(REPLACEMENT):
            return ""
        self.ids = self.ids[self.read :] or self.ids  # what follows is decoded beside what has just come
        self.read = len(self.ids)
        return new[len(old) :]


class StopCutter:
    """Text passes through until a stop string is in it; what may become one waits.

    ``stopped`` is set once a stop string was met; what was returned before ends right before it.
    """

    def __init__(self, stops: Sequence[str]):
        self.stops = tuple(stops)
        self.held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is certain after ``text`` has come."""
        if self.stopped:
            return ""
        self.held += text
        places = [p for p in (self.held.find(s) for s in self.stops) if p >= 0]
        if places:
            self.stopped = True
            return self._release(min(places), drop=True)
        return self._release(len(self.held) - self._overlap())

    def flush(self) -> str:
        """The held text, which is no stop string now that nothing follows."""
        return "" if self.stopped else self._release(len(self.held))

    def _overlap(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = max((len(s) for s in self.stops), default=1) - 1
        for n in range(min(longest, len(self.held)), 0, -1):
            if any(s.startswith(self.held[-n:]) for s in self.stops):
                return n
        return 0

    def _release(self, n: int, drop: bool = False) -> str:
        text, self.held = self.held[:n], "" if drop else self.held[n:]
        return text


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    if decoder is None or getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    return bool(json.loads(decoder.__getstate__())["type"] == "ByteLevel")


@cache
def _byte_of() -> dict[str, int]:
    """The printable character that byte-level vocabularies write for each byte (GPT-2's table), reversed."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}
