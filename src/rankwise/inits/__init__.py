"""How a form's tensors get their first values: one file an init."""
