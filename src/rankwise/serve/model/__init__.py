"""A transformers model that runs packed steps over a paged cache."""
