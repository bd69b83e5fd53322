"""Tiny bases and hand-made states, so that these tests need neither forms nor training."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.delta import AdapterState, LowRank
from rankwise.seeds import generator
from rankwise.sites import find_sites

VOCAB = 64


def llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=64, **{"tie_word_embeddings": False, **sizes, **options})
    return LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()


def qwen3_moe(**options: Any) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, max_position_embeddings=64, **options,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


class Mixed(nn.Module):
    """Embedding → convolutions (plain, grouped, 2-D) → linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 16)
        self.conv = nn.Conv1d(16, 12, 3, padding=1, stride=2)
        self.grouped = nn.Conv1d(12, 12, 3, padding=1, groups=3)
        self.square = nn.Conv2d(1, 6, (3, 2), padding=1)
        self.head = nn.Linear(6, 10)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.grouped(self.conv(self.embed(ids).mT))
        return self.head(self.square(h[:, None]).mean((-1, -2)))


def mixed() -> nn.Module:
    torch.manual_seed(0)
    return Mixed().eval()


def ids() -> Tensor:
    return torch.randint(0, VOCAB, (2, 12), generator=generator(0, "test", "ids"))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out = model(ids())
    return getattr(out, "logits", out)


def random_state(
    model: nn.Module, names: list[str], r: int | dict[str, int] = 4, scale: float | dict[str, float] = 2.0
) -> AdapterState:
    """Random LowRank changes (large enough to move the logits) at the named sites."""
    sites, out = find_sites(model), {}
    for name in names:
        spec, g = sites[name].spec, generator(1, "test", name)
        rank = r[name] if isinstance(r, dict) else r
        lead = (spec.stack,) if spec.stack else ()
        A = torch.randn(*lead, rank, spec.inp, generator=g) * spec.inp**-0.5
        B = torch.randn(*lead, spec.out, rank, generator=g) * 0.2
        out[name] = LowRank(A, B, scale[name] if isinstance(scale, dict) else scale)
    return AdapterState(out)


def with_change(model: nn.Module, state: AdapterState) -> nn.Module:
    """A copy of the base with every ΔW written into its weights: the judge of what an adapter should compute."""
    model = copy.deepcopy(model)
    sites = find_sites(model)
    for name, d in state.sites.items():
        sites[name].write(sites[name].read() + d.scale * d.B @ d.A)
    params = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in state.full.items():
            params[name].copy_(value)
    return model


def every(model: nn.Module, *ends: str) -> list[str]:
    """Names of the sites that end with one of ``ends``."""
    return [n for n in find_sites(model) if n.endswith(ends)]
