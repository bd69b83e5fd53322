"""The real input that ships: a pretrained base, text and image tasks, all made from what every install has."""

from rankwise.assets.load import base_path, digits_vit_path, load_base, load_digits_vit
from rankwise.assets.measure import bits_per_byte, unigram_bits_per_byte

__all__ = [
    "base_path",
    "bits_per_byte",
    "digits_vit_path",
    "load_base",
    "load_digits_vit",
    "unigram_bits_per_byte",
]
