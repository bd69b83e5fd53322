"""From the user's files to tokenised, loss-masked, packed examples."""

from rankwise.train.data.collate import Collator, attention_for, tokens_of_loss
from rankwise.train.data.images import read_images
from rankwise.train.data.isolation import check_isolation
from rankwise.train.data.layouts import Record
from rankwise.train.data.packing import Packed, pack
from rankwise.train.data.readers import read
from rankwise.train.data.sampler import Sampler
from rankwise.train.data.tokens import Example, tokenize

__all__ = [
    "Collator",
    "Example",
    "Packed",
    "Record",
    "Sampler",
    "attention_for",
    "check_isolation",
    "pack",
    "read",
    "read_images",
    "tokenize",
    "tokens_of_loss",
]
