"""Models and data that ship with the package: a small pretrained base, an image classifier, text and image tasks."""

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
