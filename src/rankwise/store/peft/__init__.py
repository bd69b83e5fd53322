"""PEFT's folders: read, written, and every key of their configuration accounted for."""

from rankwise.store.peft.export import export_peft
from rankwise.store.peft.info import PeftInfo
from rankwise.store.peft.read import read_peft

__all__ = ["PeftInfo", "export_peft", "read_peft"]
