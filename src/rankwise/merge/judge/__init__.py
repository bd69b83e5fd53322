"""What a merge may ask of a model: scores, gradients, overlaps."""
