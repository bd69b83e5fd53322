"""What a weight does in its model: its role by name, the parts of fused projections, the index of its layer.

Module names differ between architectures; recipes name roles (q, k, v, o, gate, up, down, …).  One table, looked up by
the last part of the module's path; a name that is not in it is its own role.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

_ROLES = {
    "q": "q_proj q query q_lin to_q wq query_proj q_a_proj q_b_proj",
    "k": "k_proj k key k_lin to_k wk key_proj",
    "v": "v_proj v value v_lin to_v wv value_proj",
    "o": "o_proj o out_lin wo to_out",
    "qkv": "qkv_proj query_key_value c_attn qkv Wqkv W_pack in_proj_weight",
    "gate": "gate_proj w1 wi_0",
    "up": "up_proj w3 wi_1 wi fc1 c_fc dense_h_to_4h lin1 linear1",
    "down": "down_proj w2 fc2 dense_4h_to_h lin2 linear2",
    "gate_up": "gate_up_proj",
    "head": "lm_head classifier score embed_out proj_out qa_outputs",
    "embed": "embed_tokens wte word_embeddings embed_in token_embedding shared tok_embeddings embeddings",
    "position": "wpe position_embeddings embed_positions position_embedding",
}
_BY_NAME = {name: role for role, names in _ROLES.items() for name in names.split()}
#: model types whose fused projection holds q, k and v of one head together, where every head has its own k and v
_BY_HEAD = {"gpt_neox", "gpt_neox_japanese", "bloom", "falcon", "persimmon", "gpt_bigcode"}
#: … whose parts are cut once more, to lie on several devices
_SCATTERED = {"codegen"}
#: roles whose sites share an input when they stand in the same module
_SAME_INPUT = ({"q", "k", "v"}, {"gate", "up"})
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|encoder|decoder)\.(\d+)(?:\.|$)")


def layer_of(path: str) -> int:
    """Index of the transformer layer a path lies in, or -1: ``model.layers.3.mlp`` → 3."""
    found = _LAYER.findall(path)
    return int(found[0]) if found else -1


def role_of(path: str, kind: str) -> str:
    """The role of the weight at ``path`` (module path, or path.parameter)."""
    parts = path.split(".")
    last = parts[-1]
    above = ".".join(parts[:-1]).lower()
    if last in ("out_proj", "c_proj", "dense"):  # the same name is used in attention and in the MLP
        if "attn" in above or "attention" in above:
            return "o"
        if "intermediate" in above:
            return "up"
        if "mixer" in above:
            return "out"
        return "down" if ("mlp" in above or "output" in above) else last
    if last == "wo" and ("densere" in above or "mlp" in above or "ff" in parts[-2].lower()):
        return "down"  # T5
    role = _BY_NAME.get(last, last)
    if role == "embed" and kind != "embedding":
        return last
    if kind == "conv":
        return role if role != last else "conv"
    return role


def parts_of(model: nn.Module, module: nn.Module, role: str, out: int) -> Iterator[tuple[str, tuple[int, int], tuple[int, int]]]:
    """(role, rows, repeat) of each part of a fused projection, or nothing; see :class:`SiteSpec`.

    The split is read from the model's config and checked against ``out``: a layout that does not add up
    has no parts, so a wrong guess cannot give a part another's rows.

    Args:
        model: for its config.
        module: the one that holds the weight; its own config comes first.
        role: "qkv" or "gate_up"; others have no parts.
        out: rows of the fused weight.
    """
    config = getattr(module, "config", None) or getattr(model, "config", None)
    if role == "gate_up" and out % 2 == 0:
        yield "gate", (0, out // 2), (1, 0)
        yield "up", (out // 2, out), (1, 0)
    elif role == "qkv" and isinstance(module, nn.MultiheadAttention):
        d = module.embed_dim
        if out == 3 * d:
            yield from (("q", (0, d), (1, 0)), ("k", (d, 2 * d), (1, 0)), ("v", (2 * d, 3 * d), (1, 0)))
    elif role == "qkv" and config is not None:
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        heads = getattr(text, "num_attention_heads", 0)
        if not heads:
            return
        dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        kv = getattr(text, "num_key_value_heads", None) or heads
        if (heads + 2 * kv) * dim != out:
            return
        kind = getattr(text, "model_type", "")
        if kind in _SCATTERED:
            return
        if kind in _BY_HEAD and kv == heads:  # q, k, v of one head stand together
            for i, part in enumerate("qkv"):
                yield part, (i * dim, (i + 1) * dim), (heads, 3 * dim)
            return
        q, k = heads * dim, kv * dim
        yield from (("q", (0, q), (1, 0)), ("k", (q, q + k), (1, 0)), ("v", (q + k, q + 2 * k), (1, 0)))


def input_key(path: str, role: str, inp: int) -> str:
    """The input group: sites with the same key take the very same tensor as input (q/k/v of one attention, gate/up of one MLP).

    Cross-attention reads k and v from the encoder; such modules are named so and keep q apart.
    """
    parent = path.rpartition(".")[0]
    for n, group in enumerate(_SAME_INPUT):
        if role in group:
            cross = re.search(r"cross|encoder_attn|EncDecAttention", parent)
            apart = ":q" if cross and role == "q" else ""
            return f"{parent}#{n}{apart}:{inp}"
    return ""
