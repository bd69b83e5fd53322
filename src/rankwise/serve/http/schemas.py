"""The bodies that the routes take, and how bytes become them: bounded while they are read, typed, unknown fields listed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from rankwise.errors import nearest
from rankwise.serve.http.errors import Refusal, bad

if TYPE_CHECKING:
    from rankwise.serve.http.settings import Settings

Name = Annotated[str, Field(min_length=1, max_length=512)]


class Body(BaseModel):
    """No value is converted: ``"5"`` is no number, ``true`` is no 1."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class MixPart(Body):
    """One adapter of a mix."""

    name: Name
    weight: float = 1.0


class StreamOptions(Body):
    include_usage: bool = False


class Generate(Body):
    """What both APIs share.

    Extensions: ``adapters``, ``top_k``, ``ignore_eos``, ``stop_token_ids``, ``cache_salt``, ``deadline`` (seconds to the first token).
    """

    model: Name
    adapters: list[MixPart] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    ignore_eos: bool | None = None
    cache_salt: str | None = None
    deadline: Annotated[float, Field(gt=0, le=86_400)] | None = None
    user: str | None = None


class Completion(Generate):
    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[TextPart]
    name: str | None = None


class Chat(Generate):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class LoadAdapter(Body):
    """vLLM's body.  ``load_inplace``: put new weights in the place of those that the name has."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False


class UnloadAdapter(Body):
    lora_name: Name


#: fields of the protocols that would change the answer and are not served → the values that ask for nothing
UNSERVED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []), "tool_choice": (None, "none"), "functions": (None, []), "function_call": (None, "none"),
    "response_format": (None, {"type": "text"}), "modalities": (None, ["text"]), "audio": (None,), "prediction": (None,),
    "suffix": (None, ""), "min_p": (None, 0, 0.0), "min_tokens": (None, 0), "repetition_penalty": (None, 1, 1.0),
    "use_beam_search": (None, False), "lora_int_id": (None,), "is_3d_lora_weight": (None, False),
}  # fmt: skip

B = TypeVar("B", bound=Body)


async def read(request: Request, schema: type[B], settings: Settings) -> tuple[B, list[str]]:
    """The request's body as ``schema``, and the names of the fields that will be ignored (none where strict).

    Raises:
        Refusal: 400 (no JSON, too deep, a wrong field), 408 (too slow), 413 (too large; known from the header or while reading).
    """
    data = parse(await _bytes(request, settings), settings)
    try:
        body = schema.model_validate(data)
    except ValidationError as error:
        raise _first(error) from None
    ignored = _extras(body)
    for name, value in (body.model_extra or {}).items():
        if name in UNSERVED:
            if value not in UNSERVED[name] or isinstance(value, bool) != any(value is v for v in (True, False)):
                raise bad(f"{name} is not served here, and the answer would differ without it; leave it out.", name, "unsupported")
            ignored.remove(name)
    if ignored and settings.strict:
        known = ", ".join(f"{n!r} ({nearest(n.rsplit('.', 1)[-1], schema.model_fields)})" for n in ignored[:3])
        raise bad(f"Unknown field {known} This server refuses fields that it does not know.", ignored[0], "unknown_field")
    return body, ignored


def noted(ignored: Sequence[str]) -> dict[str, str]:
    """The header that names ignored fields, percent-encoded where a header could not hold what a client made up; {} for none."""
    if not ignored:
        return {}
    names = (quote(n, safe="!#$&'()*+/:;=?@[]^`{|}<>", errors="replace") or '""' for n in ignored)
    return {"x-rankwise-ignored": ", ".join(names)[:1024].rstrip(" ,")}


def parse(raw: bytes, settings: Settings) -> dict[str, Any]:
    """JSON with an object at its root.  Raises Refusal (400)."""
    try:
        data = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise bad(f"The body is not JSON: {error}.", code="invalid_json") from None
    if not isinstance(data, dict):
        raise bad(f"The body is a JSON {type(data).__name__}; it is an object with fields.", code="invalid_json")
    if _deeper(data, settings.depth):
        raise bad(f"The body nests more than {settings.depth} levels deep.", code="invalid_json")
    return data


async def _bytes(request: Request, settings: Settings) -> bytes:
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > settings.body_bytes:
        raise _huge(int(declared), settings)
    raw = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for chunk in request.stream():
                raw += chunk
                if len(raw) > settings.body_bytes:
                    raise _huge(len(raw), settings)
    except TimeoutError:
        raise Refusal(408, "request_timeout", f"The body did not arrive within {settings.body_seconds:g} s.") from None
    except ClientDisconnect:
        raise Refusal(400, "client_gone", "The client closed the connection before its request was whole.") from None
    return bytes(raw)


def _huge(size: int, settings: Settings) -> Refusal:
    return Refusal(413, "body_too_large", f"The body has {size} bytes or more; this server takes {settings.body_bytes}.")


def _deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    if levels == 0:
        return True
    return any(_deeper(v, levels - 1) for v in (value.values() if isinstance(value, dict) else value) if isinstance(v, dict | list))


def _first(error: ValidationError) -> Refusal:
    """One sentence about the first wrong field, in the user's words."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(p) for p in first["loc"] if not str(p).startswith(("list[", "str", "constrained", "function")))
    if first["type"] == "missing":
        return bad(f"The field {place!r} is missing.", place, "missing_field")
    shown = repr(first["input"])
    return bad(
        f"{place} = {shown[:80] + ('…' if len(shown) > 80 else '')}: {first['msg'][0].lower() + first['msg'][1:]}.",
        place,
        "invalid_value",
    )


def _extras(body: BaseModel, before: str = "") -> list[str]:
    """Names of fields that the schema lacks, with their places."""
    names = [before + n for n in body.model_extra or {}]
    for field in type(body).model_fields:
        value = getattr(body, field)
        for i, item in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(item, BaseModel):
                names += _extras(item, f"{before}{field}." if not isinstance(value, list) else f"{before}{field}.{i}.")
    return names
