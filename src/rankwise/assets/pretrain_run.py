"""Makes the shipped base: ``python -m rankwise.assets.pretrain`` trains a 5 M-parameter Llama on Python's own source.

The run is a function of (config, seed, progress): the batch of step t is drawn from t alone, the learning rate
follows the share of the budget that is spent (a warm-up, a plateau, a linear fall to nothing over the last 60 %), and
the state on disk holds weights, AdamW's moments, step and seconds spent, so a run that is stopped goes on where it
was.  Under ``--steps`` the budget is counted in steps and the result repeats bit for bit; under ``--minutes`` it is
counted in seconds of training, and how many steps fit depends on the machine.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rankwise import errors
from rankwise.assets import corpus
from rankwise.assets.tokenizer import train_tokenizer
from rankwise.seeds import generator, seed_of


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """What is trained and how.

    Attributes:
        hidden, layers, heads, kv_heads, head_dim, intermediate: of the Llama.
        vocab: entries of the tokenizer.
        context: tokens of a sequence.
        batch: sequences a step.
        lr: peak learning rate.
        weight_decay: of matrices.
        warmup: steps.
        decay_from: share of the budget after which the rate falls linearly to 0.
        seed: of weights and order.
        corpus_bytes: bytes of the corpus that are used; 0: all.
    """

    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 704
    vocab: int = 4096
    context: int = 512
    batch: int = 4
    lr: float = 2e-3
    weight_decay: float = 0.1
    warmup: int = 60
    decay_from: float = 0.4
    seed: int = 0
    corpus_bytes: int = 0


_TINY_SHAPE = {"hidden": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "intermediate": 64, "vocab": 512}
TINY = PretrainConfig(**_TINY_SHAPE, context=64, batch=4, warmup=2, corpus_bytes=200_000)  # type: ignore[arg-type]


def build_model(config: PretrainConfig, tokenizer: Any) -> Any:
    """A fresh `LlamaForCausalLM` with tied embeddings, fp32, drawn from the config's seed."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as e:
        raise errors.need("transformers", "hf", "Pretraining the base") from e
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(config.seed, "pretrain", "weights"))
        return LlamaForCausalLM(llama)


def training_texts(config: PretrainConfig) -> list[str]:
    """The pretraining documents in their fixed order, as many as ``corpus_bytes`` allows."""
    texts, taken = [], 0
    for name in corpus.pretraining_files():
        texts.append(corpus.read(name))
        taken += len(texts[-1].encode())
        if config.corpus_bytes and taken >= config.corpus_bytes:
            break
    return texts


def token_stream(texts: list[str], tokenizer: Any) -> torch.Tensor:
    """All documents as one int32 stream, each between BOS and EOS."""
    ids: list[int] = []
    for text in texts:
        ids += [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    return torch.tensor(ids, dtype=torch.int32)


class Batches:
    """Batch of step t, from t alone: each epoch cuts the stream at another offset and visits its windows shuffled."""

    def __init__(self, stream: torch.Tensor, config: PretrainConfig) -> None:
        self.stream, self.config = stream, config
        self.windows = len(stream) // config.context - 1
        self._epoch, self._order, self._offset = -1, torch.empty(0), 0

    def _start(self, index: int) -> int:
        epoch, place = divmod(index, self.windows)
        if epoch != self._epoch:
            draw = generator(self.config.seed, "pretrain", f"epoch {epoch}")
            self._order = torch.randperm(self.windows, generator=draw)
            self._offset = int(torch.randint(self.config.context, (1,), generator=draw))
            self._epoch = epoch
        return self._offset + int(self._order[place]) * self.config.context

    def __call__(self, step: int) -> torch.Tensor:
        """Token ids (batch, context), int64."""
        size, length = self.config.batch, self.config.context
        starts = [self._start(step * size + i) for i in range(size)]
        return torch.stack([self.stream[s : s + length] for s in starts]).long()


def learning_rate(config: PretrainConfig, step: int, progress: float) -> float:
    """Warm-up by steps, plateau, then linear in ``progress`` (share of the budget spent) down to 0."""
    fall = 1.0 if progress < config.decay_from else max(0.0, (1 - progress) / (1 - config.decay_from))
    return config.lr * min(1.0, (step + 1) / config.warmup) * fall


def make_optimizer(model: Any, config: PretrainConfig) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def fast_bf16(device: torch.device) -> bool:
    """Whether bf16 products run in hardware; emulated ones take 30 times as long in the backward pass."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@dataclasses.dataclass
class PretrainRun:
    """A pretraining run and its state on disk (``work/state.pt``, ``work/tokenizer``)."""

    config: PretrainConfig
    work: Path

    def __post_init__(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = self._tokenizer()
        self.model = build_model(self.config, self.tokenizer).to(self.device)
        self.optimizer = make_optimizer(self.model, self.config)
        self.step, self.seconds, self.progress = 0, 0.0, 0.0
        self.losses: list[float] = []
        if (self.work / "state.pt").exists():
            self._restore()

    def _tokenizer(self) -> Any:
        from transformers import PreTrainedTokenizerFast

        folder = self.work / "tokenizer"
        if not folder.exists():
            partial = self.work / "tokenizer.partial"
            made = train_tokenizer(training_texts(self.config), self.config.vocab, self.config.context)
            made.save_pretrained(partial)
            os.replace(partial, folder)
        return PreTrainedTokenizerFast.from_pretrained(folder)

    def _restore(self) -> None:
        state = torch.load(self.work / "state.pt", map_location=self.device, weights_only=True)
        if state["config"] != dataclasses.asdict(self.config):
            raise errors.OptionError(
                f"{self.work} holds a run with another config ({state['config']}); "
                "give its own config to go on with it, or another --work folder to begin afresh."
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.progress = state["step"], state["seconds"], state["progress"]
        self.losses = state["losses"]

    def save(self) -> None:
        """Writes the state to a second file and renames it, so that a stop at any moment leaves a complete one."""
        state = {
            "config": dataclasses.asdict(self.config),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "progress": self.progress,
            "losses": self.losses,
        }
        torch.save(state, self.work / "state.pt.partial")
        os.replace(self.work / "state.pt.partial", self.work / "state.pt")

    def train(
        self,
        steps: int | None = None,
        minutes: float | None = None,
        stop_at: int | None = None,
        checkpoint_seconds: float = 120.0,
        say: Callable[[str], None] = print,
    ) -> None:
        """Trains to the end of the budget, or stops, saved, at step ``stop_at``.

        Args:
            steps: the budget in optimiser steps; or
            minutes: in minutes of training; exactly one of the two.
            stop_at: step at which to stop before the budget is spent.
            checkpoint_seconds: between two saves.
            say: gets a line every 50 steps.
        """
        if (steps is None) == (minutes is None):
            raise errors.OptionError(f"Got steps={steps} and minutes={minutes}; give exactly one budget.")
        batches = Batches(token_stream(training_texts(self.config), self.tokenizer), self.config)
        say(f"{len(batches.stream)} tokens, {self.model.num_parameters()} parameters, from step {self.step}")
        self.model.train()
        began, before, saved = time.monotonic(), self.seconds, time.monotonic()
        while self.progress < 1.0 and (stop_at is None or self.step < stop_at):
            self._one_step(batches(self.step))
            self.seconds = before + time.monotonic() - began
            self.progress = self.step / steps if steps else self.seconds / (60 * float(minutes or 0))
            if self.step % 50 == 0:
                mean = sum(self.losses[-50:]) / len(self.losses[-50:])
                say(f"step {self.step} progress {self.progress:.3f} seconds {self.seconds:.0f} loss {mean:.4f}")
            if time.monotonic() - saved > checkpoint_seconds:
                self.save()
                saved = time.monotonic()
        self.save()

    def _one_step(self, ids: torch.Tensor) -> None:
        lr = learning_rate(self.config, self.step, self.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        ids = ids.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=fast_bf16(self.device)):
            logits = self.model(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        if not torch.isfinite(loss):
            raise errors.TrainingError(f"The loss was {loss.item()} at step {self.step}; the last saved state is kept.")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())
        self.step += 1
