"""Adapter files: native and PEFT's, written atomically, read strictly, bound to their base by a fingerprint."""
