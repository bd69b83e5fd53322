"""From the user's files to tokenised, loss-masked, packed examples."""

from rankwise.train.data.packing import Collator, check_isolation, pack
from rankwise.train.data.readers import Record, read
from rankwise.train.data.tokens import Example, tokenize

__all__ = ["Collator", "Example", "Record", "check_isolation", "pack", "read", "tokenize"]
