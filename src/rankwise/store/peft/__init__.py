"""PEFT's folders: read, written, and every key of their configuration accounted for."""
