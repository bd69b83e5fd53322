"""What the forward that runs in this thread is about: the view in force, the batch, and what blocks tell their linears.

One thread-local object, because a compiled graph can trace and guard it; a context variable breaks the graph at every site.
It holds plain values only and knows none of the classes it carries.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor


class ForwardContext(threading.local):
    """This thread's forward.

    Attributes:
        view: the innermost :class:`~rankwise.runtime.view.View` entered in this thread, whatever model it is of.
        batch: (rows, tokens) of the running forward of the root model.
        rows: the batch row of each row of x, inside a block that expanded its rows.
        decisions: block → what its linears need to know of the rows they see.
        padding: (B, T) which tokens of the running root forward are real, for routers.
        step: the :class:`~rankwise.serve.batch.TokenPlan` of the packed step that serving runs; None outside one.
        attention: of that step, (its :class:`~rankwise.serve.model.paged_attention.AttentionStep`, the key-value store).
        window: of a fine-tuning pass beside serving, the :class:`~rankwise.serve.finetune.windowed_attention.Before` of the layer that runs.
    """

    view: Any = None
    batch: tuple[int, int] | None = None
    rows: Tensor | None = None
    decisions: dict[str, Any] | None = None
    padding: Tensor | None = None
    step: Any = None
    attention: Any = None
    window: Any = None


forward_context = ForwardContext()


def keep_view(fn: Callable[..., Any], chosen: Any = None) -> Callable[..., Any]:
    """Capture the current context and restore it around ``fn``: for another thread, or a checkpoint of your own.

    Args:
        fn: any callable.
        chosen: a view to restore instead of the current one.
    """
    kept = chosen if chosen is not None else forward_context.view
    kept_here = forward_context.batch, forward_context.decisions, forward_context.rows, forward_context.padding

    @functools.wraps(fn, assigned=("__doc__",))
    def run(*args: Any, **kwargs: Any) -> Any:
        before = (
            forward_context.view,
            forward_context.batch,
            forward_context.decisions,
            forward_context.rows,
            forward_context.padding,
        )
        forward_context.view, (forward_context.batch, forward_context.decisions, forward_context.rows, forward_context.padding) = (
            kept,
            kept_here,
        )
        try:
            return fn(*args, **kwargs)
        finally:
            (
                forward_context.view,
                forward_context.batch,
                forward_context.decisions,
                forward_context.rows,
                forward_context.padding,
            ) = before

    return run
