"""A byte-level tokenizer trained here, that trims offsets (as `tokenizers` does unless told otherwise)."""

from __future__ import annotations

from typing import Any

import pytest

SPECIAL = ("<bos>", "<eos>", "<pad>", "<user>", "<assistant>", "<system>", "<tool>")
PLAIN = (
    "{{ bos_token }}{% for m in messages %}{{ '<' + m['role'] + '>' }}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{{ eos_token }}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
CORPUS = [
    "the cat sat on the mat\n\nand the dog ran off",
    "one two three four five\n six seven",
    "def f(x):\n    return x + 1\n",
] * 4


def make(bos: bool = True, template: str | None = PLAIN, space: bool = False) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    if space:  # puts a blank before all it is given, as SentencePiece does
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        core.decoder = decoders.Metaspace(prepend_scheme="always")
    else:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
    alphabet = sorted({c for t in CORPUS for c in t}) if space else sorted(pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    )
    steps: list[Any] = [] if space else [processors.ByteLevel(trim_offsets=True)]
    if bos:
        steps.append(processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)]))
    if steps:
        core.post_processor = processors.Sequence(steps)
    out = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=list(SPECIAL[3:]),
        clean_up_tokenization_spaces=False,
    )
    out.chat_template = template
    return out


@pytest.fixture
def tokenizer() -> Any:
    return make()


def learnt(example: Any, tokenizer: Any) -> str:
    return tokenizer.decode([t for t, label in zip(example.input_ids, example.labels, strict=True) if label != -100])
