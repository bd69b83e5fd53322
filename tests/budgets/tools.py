"""A short run of a recipe through a Session."""

from __future__ import annotations

from typing import Any

import rankwise as rw
from tests.models import batch_for, llama


def run(recipe: dict[str, Any], steps: int, each: Any = None, layers: int = 2, lr: float = 1e-2, **options: Any) -> tuple[Any, Any]:
    model = llama(layers=layers)
    adapter = rw.attach(model, recipe)
    session = rw.Session(model, adapter, lr=lr, total_steps=steps, **options)
    batch = batch_for(model, rows=4)
    model.train()
    for _ in range(steps):
        session.step_begin()
        out = model(**batch)
        (out.loss + session.penalty(out, batch)).backward()
        if each is not None:
            each(session, "backward")
        session.step()
        if each is not None:
            each(session, "step")
    return adapter, session
