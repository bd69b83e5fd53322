"""Formats a weight or an adapter may be stored in; each is registered under kind ``codec``."""

from __future__ import annotations

from rankwise.codecs.base import AdapterCodec, Codec
from rankwise.codecs.bridge import Bridge
from rankwise.codecs.library import find_bridge, is_quantised, keep_stored

__all__ = ["AdapterCodec", "Bridge", "Codec", "find_bridge", "is_quantised", "keep_stored"]
