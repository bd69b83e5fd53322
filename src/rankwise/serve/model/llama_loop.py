"""Steps of a Llama-like decoder without its modules' own forwards: the same numbers in a quarter of the calls.

At sixteen rows a small model's step is half calls: norms of six operators, rotary embedding of ten, views, keyword
arguments handed from layer to layer.  This loop runs what those classes compute on rows × width tensors; every linear
and the embedding stay the model's hooked ones, so whatever an adapter does, it does here too.  It stands for the
classes named in :data:`KNOWN` alone, and only where :class:`~rankwise.serve.model.runner.NativeRunner`'s probe finds the
model's own logits in it; any other model runs through its modules.

    h = norm₁(x);  q, k, v = rope(W_q h), rope(W_k h), W_v h;  x += W_o·attention(q, k, v)
    h = norm₂(x);  x += W_down(act(W_gate h) ⊙ W_up h)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankwise.serve.model.linear_hooks import Hook
from rankwise.serve.model.paged_attention import attend

if TYPE_CHECKING:
    from rankwise.serve.batch import TokenPlan

#: folder of transformers' models → what its classes' names begin with
KNOWN = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
#: kinds of rotary embedding whose angles depend on the position alone
FIXED = frozenset({"default", "linear", "llama3", "yarn"})


def loop_of(model: nn.Module) -> Loop | None:
    """The loop that computes what ``model`` does, or None where its class is not one of those it stands for."""
    folder = next((f for f in KNOWN if type(model).__module__ == f"transformers.models.{f}.modeling_{f}"), None)
    if folder is None or type(model).__name__ != f"{KNOWN[folder]}ForCausalLM" or _watched(model):
        return None
    inner: Any = model.model
    parts = {"DecoderLayer": inner.layers, "Attention": [b.self_attn for b in inner.layers], "MLP": [b.mlp for b in inner.layers]}
    for name, modules in parts.items():
        if any(type(m).__name__ != KNOWN[folder] + name or "forward" in m.__dict__ for m in modules):
            return None
    if getattr(inner.rotary_emb, "rope_type", None) not in FIXED:
        return None
    return Loop(model)


def _watched(model: nn.Module) -> bool:
    """Whether somebody's hooks wait for a module's forward, which would not come."""
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Loop:
    """One step of ``model``, whose linears are hooked; see the module."""

    def __init__(self, model: Any):
        inner = model.model
        self.embed: nn.Module = inner.embed_tokens
        self.rotary: nn.Module = inner.rotary_emb
        self.blocks = [LoopLayer(b) for b in inner.layers]
        self.norm = _norm(inner.norm)
        self.head: nn.Module = model.lm_head
        self.angles = torch.empty(0, 0)

    def __call__(self, plan: TokenPlan) -> Tensor:
        """(S, vocabulary): logits of the sample rows."""
        x = self.embed.forward(plan.tokens)
        turn = self._turn(plan, x)
        for block in self.blocks:
            x = block(x, turn)
        if plan.sample_rows.shape[0] != x.shape[0]:
            x = x.index_select(0, plan.sample_rows)
        return self.head.forward(self.norm(x))  # type: ignore[no-any-return]

    def _turn(self, plan: TokenPlan, x: Tensor) -> tuple[Tensor, Tensor]:
        """cos (T, 1, d) and sin (T, 1, d/2) of the rows' positions, from a table that grows with the contexts seen."""
        most = max(s.end for s in plan.spans)
        if most > self.angles.shape[0]:
            at = torch.arange(1 << max(most - 1, 63).bit_length(), device=x.device)[None]
            cos, sin = self.rotary(x, at)
            self.angles = torch.cat([cos[0], sin[0]], -1)
        both = self.angles.index_select(0, plan.positions)[:, None]
        d = both.shape[-1] // 2
        return both[..., :d], both[..., d : d + d // 2]


class LoopLayer:
    """One decoder layer."""

    def __init__(self, block: Any):
        a, m = block.self_attn, block.mlp
        self.layer: int = a.layer_idx
        self.q, self.k, self.v, self.o = (getattr(a, f"{n}_proj") for n in "qkvo")
        self.gate, self.up, self.down, self.act = m.gate_proj, m.up_proj, m.down_proj, m.act_fn
        self.qkv, self.gate_up = Siblings(self.q, self.k, self.v), Siblings(self.gate, self.up)
        self.before, self.after = _norm(block.input_layernorm), _norm(block.post_attention_layernorm)
        self.q_norm, self.k_norm = (_norm(n) if (n := getattr(a, f"{x}_norm", None)) is not None else None for x in "qk")
        self.d, self.scale = a.head_dim, a.scaling
        self.heads, self.kv = a.q_proj.out_features // self.d, a.k_proj.out_features // self.d
        self.window: int | None = (
            a.config.sliding_window if type(a).__name__ == "MistralAttention" else getattr(a, "sliding_window", None)
        )

    def __call__(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """x: (T, width), changed in place."""
        q, k, v = self._heads(self.before(x), turn)
        y = attend(self.layer, q, k, v, self.scale, self.window)
        x += self.o.forward(y.view(y.shape[0], -1))
        h = self.after(x)
        if (both := self.gate_up(h)) is None:
            gate, up = self.gate.forward(h), self.up.forward(h)
        else:
            gate, up = both[:, : both.shape[1] // 2], both[:, both.shape[1] // 2 :]
        x += self.down.forward(self.act(gate).mul_(up))
        return x

    def _heads(self, h: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(T, heads, d) of q and (T, kv heads, d) of k, turned by their positions, and of v."""
        T, d, n = h.shape[0], self.d, self.heads
        y = self.qkv(h)
        if y is None:
            q, k, v = (m.forward(h).view(T, -1, d) for m in (self.q, self.k, self.v))
        else:
            y = y.view(T, -1, d)
            turned, v = y[:, : n + self.kv], y[:, n + self.kv :]
            if self.q_norm is None:
                turned = _rotate(turned, turn)
                return turned[:, :n], turned[:, n:], v
            q, k = turned[:, :n], turned[:, n:]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return _rotate(q, turn), _rotate(k, turn), v


class Siblings:
    """Modules that are given one input: their outputs side by side where they are one product in this order."""

    def __init__(self, *modules: nn.Module):
        self.modules = modules
        self.hook: Hook | None = None

    def __call__(self, x: Tensor) -> Tensor | None:
        """(T, Σ out), or None where each is to be called."""
        if self.hook is None:  # hooks come after the loop is made
            hooks = [m.forward for m in self.modules if isinstance(m.forward, Hook)]
            first = hooks[0] if hooks else None
            if first is None or [(h.bundle, h.j) for h in hooks] != [(first.bundle, j) for j in range(len(self.modules))]:
                return None
            self.hook = first
        return self.hook.joint(x) if len(self.hook.bundle.group.outs) == len(self.modules) else None


def _rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """(x₁, x₂) → (x₁·cos − x₂·sin, x₂·cos + x₁·sin), halves of the last dimension."""
    cos, sin = turn
    half = x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin, value=-1)
    y[..., half:].addcmul_(x[..., :half], sin)
    return y


def _norm(module: Any) -> Callable[[Tensor], Tensor]:
    """The module's own forward, or in fp32, where nothing is rounded on the way, w·x/√(‖x‖²/n + ε) in four operators."""
    weight, n = module.weight, module.weight.shape[0]
    if weight.dtype != torch.float32:
        return module.forward  # type: ignore[no-any-return]
    eps = torch.tensor(module.variance_epsilon, device=weight.device)

    def norm(x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x * torch.addcmul(eps, size, size, value=1 / n).rsqrt_()).mul_(weight)

    return norm
