"""Answers in OpenAI's two forms, whole and as server-sent events."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise.serve.http.choices import OutputDelta, OutputStream, TokenLogprob

#: JSON has no infinity; what clients of these APIs know in its place
LOWEST = -9999.0
DONE = b"data: [DONE]\n\n"


def frame(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(value) + b"\n\n"


def encode(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def usage(prompts: Sequence[int], choices: Sequence[OutputStream]) -> dict[str, Any]:
    """Tokens counted: each prompt once, whatever ``n``."""
    each = max(len(choices) // max(len(prompts), 1), 1)
    reused = sum(max(c.reused for c in choices[i : i + each]) for i in range(0, len(choices), each))
    made = sum(c.generated for c in choices)
    return {
        "prompt_tokens": sum(prompts),
        "completion_tokens": made,
        "total_tokens": sum(prompts) + made,
        "prompt_tokens_details": {"cached_tokens": reused},
    }


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """What all parts of one answer carry.

    Attributes:
        id, created: of the answer; seconds since 1970.
        model: as it was asked for.
        fingerprint: names the weights that answered.
    """

    id: str
    created: int
    model: str
    fingerprint: str
    prefix = object = chunk_object = ""  # of the id, and the kinds of answer

    def head(self, chunk: bool = False) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.chunk_object if chunk else self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        """The choice of the first event, where the form has one."""
        return None

    def choice(self, text: str, pieces: Sequence[OutputDelta], index: int, finish: str | None) -> dict[str, Any]:
        """One choice of the whole answer.

        Args:
            text: all of it.
            pieces: as they came.
            index: of the choice.
            finish: why it ended.
        """
        raise NotImplementedError

    def delta(self, text: str, logged: Sequence[TokenLogprob], index: int, finish: str | None) -> dict[str, Any]:
        """One choice of an event.

        Args:
            text: new text.
            logged: log-probabilities of its tokens.
            index: of the choice.
            finish: why it ended, None before the end.
        """
        raise NotImplementedError

    def whole(self, choices: Sequence[OutputStream], echoes: Sequence[str], prompts: Sequence[int]) -> dict[str, Any]:
        """The answer at once; ``echoes``: text before each choice."""
        made = []
        for c, echo in zip(choices, echoes, strict=True):
            assert c.outcome is not None
            made.append(self.choice(echo + "".join(p.text for p in c.parts), c.parts, c.index, c.outcome.value))
        return {**self.head(), "choices": made, "usage": usage(prompts, choices)}

    def chunk(self, choices: list[dict[str, Any]], count: dict[str, Any] | None, counted: bool) -> bytes:
        """One event; where usage was asked for (``counted``), every event has the field."""
        return frame({**self.head(chunk=True), "choices": choices} | ({"usage": count} if counted else {}))

    def chunks(self, piece: OutputDelta, counted: bool) -> bytes:
        """The events of a piece: its text, then the word that the choice is finished."""
        out = b""
        if piece.text or piece.logged:
            out += self.chunk([self.delta(piece.text, piece.logged, piece.index, None)], None, counted)
        if piece.finish:
            out += self.chunk([self.delta("", (), piece.index, piece.finish)], None, counted)
        return out


class ChatReply(Reply):
    prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any]:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def choice(self, text: str, pieces: Sequence[OutputDelta], index: int, finish: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        logged = [e for p in pieces for e in p.logged]
        return {"index": index, "message": message, "logprobs": _chat_logprobs(logged), "finish_reason": finish}

    def delta(self, text: str, logged: Sequence[TokenLogprob], index: int, finish: str | None) -> dict[str, Any]:
        delta = {} if finish else {"content": text}
        return {"index": index, "delta": delta, "logprobs": _chat_logprobs(logged), "finish_reason": finish}


class TextReply(Reply):
    prefix = "cmpl-"
    object = "text_completion"
    chunk_object = "text_completion"

    def choice(self, text: str, pieces: Sequence[OutputDelta], index: int, finish: str | None) -> dict[str, Any]:
        return self.delta(text, [e for p in pieces for e in p.logged], index, finish)

    def delta(self, text: str, logged: Sequence[TokenLogprob], index: int, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": _text_logprobs(logged), "finish_reason": finish}


def _chat_logprobs(logged: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    def one(raw: bytes, p: float) -> dict[str, Any]:
        return {"token": raw.decode("utf-8", "replace"), "logprob": max(p, LOWEST), "bytes": list(raw)}

    content = [one(e.raw, e.logprob) | {"top_logprobs": [one(r, p) for r, p in e.top]} for e in logged]
    return {"content": content, "refusal": None} if content else None


def _text_logprobs(logged: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    if not logged:
        return None
    return {
        "tokens": [_name(e.raw) for e in logged],
        "token_logprobs": [max(e.logprob, LOWEST) for e in logged],
        "top_logprobs": [{_name(r): max(p, LOWEST) for r, p in e.top} for e in logged],
        "text_offset": [e.offset for e in logged],
    }


def _name(raw: bytes) -> str:
    """A token as a JSON string; a part of a character is written as ``bytes:\\xe2\\x82``, as OpenAI's older API does."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)
