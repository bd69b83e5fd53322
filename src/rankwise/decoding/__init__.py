"""Several models or views that decode together: their logits combined at every step."""
