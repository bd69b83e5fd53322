"""Prompts of both APIs as token ids: text, texts, ids, or a chat through the tokenizer's own template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from rankwise.serve.http.errors import bad

if TYPE_CHECKING:
    from rankwise.serve.http.schemas import Chat, Completion, Message
    from rankwise.serve.http.settings import Settings

#: no tokenizer makes fewer tokens than this from so many characters; longer text is refused before it is read
CHARACTERS_PER_TOKEN = 64

Prompt = tuple[tuple[int, ...], str | None]
"""Token ids, and the text where it was given as text."""


def of_completion(body: Completion, tokenizer: Any, settings: Settings) -> list[Prompt]:
    """Raises Refusal."""
    given: list[Any] = (
        [body.prompt] if isinstance(body.prompt, str) or (body.prompt and isinstance(body.prompt[0], int)) else list(body.prompt)
    )
    if not 1 <= len(given) <= settings.prompts:
        raise bad(f"prompt holds {len(given)} prompts; a request has from 1 to {settings.prompts}.", "prompt")
    return [_ids(p, tokenizer, settings) for p in given]


def _ids(prompt: str | list[int], tokenizer: Any, settings: Settings) -> Prompt:
    if isinstance(prompt, str):
        return _encoded(prompt, "prompt", tokenizer, settings, special=True), prompt
    if not prompt:
        raise bad("prompt has no token; it needs at least one.", "prompt")
    for i in prompt:
        if not 0 <= i < settings.vocabulary:
            raise bad(f"prompt has the token id {i}; ids go from 0 to {settings.vocabulary - 1}.", "prompt")
    return tuple(prompt), None


def of_chat(body: Chat, tokenizer: Any, settings: Settings) -> list[Prompt]:
    """Raises Refusal: no template, or one that refuses these messages."""
    if not tokenizer.chat_template:
        raise bad("This model's tokenizer has no chat template; use /v1/completions.", "messages", "no_chat_template")
    messages = [_message(m) for m in body.messages]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise bad(f"The model's chat template refuses these messages: {str(error).splitlines()[0][:200]}.", "messages") from None
    return [(_encoded(text, "messages", tokenizer, settings, special=False), None)]


def _message(message: Message) -> dict[str, str]:
    text = message.content if isinstance(message.content, str) else "".join(p.text for p in message.content)
    return {"role": message.role, "content": text} | ({"name": message.name} if message.name else {})


def _encoded(text: str, field: str, tokenizer: Any, settings: Settings, *, special: bool) -> tuple[int, ...]:
    if len(text) > CHARACTERS_PER_TOKEN * settings.context:
        raise bad(
            f"{field} has {len(text)} characters, which cannot fit in a context of {settings.context} tokens; shorten it.",
            field,
            "context_length_exceeded",
        )
    ids = tuple(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
    if not ids:
        raise bad(f"{field} has no token; it needs at least one.", field)
    return ids
