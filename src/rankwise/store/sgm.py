"""What the first code of Stable Diffusion called the blocks of its U-Net, from diffusers' names for them.

With n residual blocks a level: input block (n+1)·i + j + 1 is residual block j of level i on the way down, and output
block (n+1)·i + j on the way up; part 0 of a block is its residual block, part 1 its attention.
"""

from __future__ import annotations

import re
from collections.abc import Collection

_BLOCK = re.compile(
    r"^(?P<way>down|up)_blocks\.(?P<i>\d+)\.(?P<what>resnets|attentions|downsamplers|upsamplers)\.(?P<j>\d+)\.(?P<rest>.+)$"
)
_MIDDLE = re.compile(r"^mid_block\.(?P<what>resnets|attentions)\.(?P<j>\d+)\.(?P<rest>.+)$")
_WHOLE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_INSIDE = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}


def layout(modules: Collection[str]) -> tuple[int, frozenset[str]]:
    """(n, the levels on the way up that attend) of a U-Net with ``modules``; n is 0 for any other model."""
    n = len({m.split(".")[3] for m in modules if m.startswith("down_blocks.0.resnets.")})
    return n, frozenset(m.split(".")[1] for m in modules if m.startswith("up_blocks.") and ".attentions." in m)


def old_names(module: str, shape: tuple[int, frozenset[str]]) -> list[str]:
    """The old name of ``module`` in a U-Net of that :func:`layout` (none where it is no part of one)."""
    n, attending = shape
    if not n:
        return []
    if module in _WHOLE:
        return [_WHOLE[module]]
    middle = _MIDDLE.match(module)
    if middle:
        at = 2 * int(middle["j"]) if middle["what"] == "resnets" else 2 * int(middle["j"]) + 1
        return [f"middle_block.{at}.{_INSIDE.get(middle['rest'], middle['rest'])}"]
    match = _BLOCK.match(module)
    if match is None:
        return []
    i, j, rest = int(match["i"]), int(match["j"]), _INSIDE.get(match["rest"], match["rest"])
    way = "input_blocks" if match["way"] == "down" else "output_blocks"
    at = (n + 1) * i + j + (1 if match["way"] == "down" else 0)
    if match["what"] == "downsamplers":
        return [f"input_blocks.{(n + 1) * (i + 1)}.0.op"]
    if match["what"] == "upsamplers":
        return [f"output_blocks.{(n + 1) * i + n}.{2 if match['i'] in attending else 1}.{rest}"]
    return [f"{way}.{at}.{0 if match['what'] == 'resnets' else 1}.{rest}"]
