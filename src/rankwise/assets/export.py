"""From a pretraining run to the folder that ships: bf16 weights, tokenizer, and a card with what was measured."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rankwise.assets import corpus
from rankwise.assets.measure import bits_per_byte, unigram_bits_per_byte
from rankwise.assets.tasks import domains

if TYPE_CHECKING:
    from rankwise.assets.pretrain_run import PretrainRun


def measure(model: Any, tokenizer: Any) -> dict[str, tuple[float, float, int]]:
    """Part -> (the model's bits per byte, the unigram entropy in bits per byte, bytes), on text it has never seen."""
    parts = {"control": corpus.control_texts()} | {name: test for name, (_, test) in domains().items()}
    parts["all"] = [text for texts in parts.values() for text in texts]
    return {
        name: (
            bits_per_byte(model, tokenizer, texts),
            unigram_bits_per_byte(tokenizer, texts),
            sum(len(text.encode()) for text in texts),
        )
        for name, texts in parts.items()
    }


def export(run: PretrainRun, out: Path) -> None:
    """Writes the base of ``run`` to ``out`` as it will be loaded: measured after the rounding to bf16, not before."""
    from transformers import LlamaForCausalLM

    shipped: Any = LlamaForCausalLM(run.model.config)
    shipped.to(torch.bfloat16)
    shipped.load_state_dict({name: tensor.to(torch.bfloat16) for name, tensor in run.model.state_dict().items()})
    out.mkdir(parents=True, exist_ok=True)
    shipped.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone; a wheel keeps the mode
    run.tokenizer.save_pretrained(out)
    card = render_card(run, measure(shipped.float().to(run.device), run.tokenizer))
    (out / "README.md").write_text(card, encoding="utf-8")
    print(card)


def render_card(run: PretrainRun, measured: dict[str, tuple[float, float, int]]) -> str:
    """The model card; a run whose budget is not spent is marked as interim."""
    config = run.config
    rows = "\n".join(f"| {name} | {size:,} | {bits:.3f} | {unigram:.3f} |" for name, (bits, unigram, size) in measured.items())
    state = "" if run.progress >= 1 else f"\n**Interim**: exported at {run.progress:.0%} of its training budget.\n"
    held = ", ".join(f"`{package}`" for package in corpus.HELD_OUT.values())
    control = ", ".join(f"`{name}`" for name in corpus.CONTROL)
    seen = run.step * config.batch * config.context
    return f"""---
license: psf-2.0
language: [code, en]
pipeline_tag: text-generation
library_name: transformers
---

# rankwise-base
{state}
A Llama of {run.model.num_parameters():,} parameters ({config.hidden} wide, {config.layers} layers, {config.heads} heads
on {config.kv_heads} key-value heads, tied embeddings, context {config.context}) with a byte-level BPE tokenizer of
{config.vocab:,} entries, trained by `python -m rankwise.assets.pretrain` (seed {config.seed}) on the standard library
of CPython {platform.python_version()}: every source file but tests and what is held out. {run.step:,} steps of
{config.batch} × {config.context} tokens, {seen:,} tokens in all, {run.seconds / 60:.0f} minutes on {run.device.type}.

Held out, from the tokenizer too: the packages {held} (domains to adapt to; the last is English prose), and the
modules {control} (control: unseen text of the training text's own kind).

Bits per byte on held-out text (the domains' test parts; windows of {config.context} that do not overlap), beside the
entropy of that text's own token frequencies, which is the best that a model blind to context could reach:

| text | bytes | model | unigram entropy |
|---|---|---|---|
{rows}

It exists so that adapters can be trained, compared and tested on real weights and real text anywhere, in seconds and
without a download. It is no assistant; the chat template is there so that chat formats can be exercised.
"""
