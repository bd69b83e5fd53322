"""What a server is told once: the model's name and bounds, and the limits that keep one client from harming another."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rankwise.errors import OptionError

#: of one request's headers
HEADER_BYTES = 16 * 1024


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """Names, bounds and limits of one server.

    Attributes:
        model: the name under which the base answers; ``root``: where it came from.
        context: most tokens of prompt and answer together; ``vocabulary``: token ids lie below it.
        ends: ids that end an answer (end of text, end of turn).
        strict: refuse fields that the protocol does not know, rather than list them in a header.
        train_roots: folders below which the training files of ``/v1/fine_tuning/jobs`` lie; none: data comes in the request.
        train_bytes: of a request with training data in it.
        body_bytes, depth, body_seconds: of a request's JSON, and the time it may take to arrive.
        choices, prompts, stops, stop_length, parts: most of ``n``, prompts, stop strings, their length, adapters in a mix.
        buffer: events kept for a reader who falls behind; ``stall_seconds``: how long one write may hang.
        quiet_seconds: without an event for so long, the engine is asked whether it lives.
        drain_seconds: how long running requests have after a terminate signal.
        labels: adapters with metrics of their own; ``aliases``: also serve the metrics that inference gateways read.
    """

    model: str
    context: int
    vocabulary: int
    root: str = ""
    ends: frozenset[int] = frozenset()
    strict: bool = False
    train_roots: tuple[Path, ...] = ()
    train_bytes: int = 64 << 20
    body_bytes: int = 1 << 20
    depth: int = 32
    body_seconds: float = 30.0
    choices: int = 16
    prompts: int = 64
    stops: int = 16
    stop_length: int = 64
    parts: int = 16
    buffer: int = 4096
    stall_seconds: float = 30.0
    quiet_seconds: float = 5.0
    drain_seconds: float = 30.0
    labels: int = 50
    aliases: bool = False

    def __post_init__(self) -> None:
        if not self.model or ":" in self.model:
            raise OptionError(
                f"The model's name is {self.model!r}; it is a word without ':', which stands between base and adapter."
            )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in ("int", "float") and not value > 0:
                raise OptionError(f"{field.name} = {value}; it is above 0.")
