"""Statistics over calibration batches (input covariance, gradients) for inits, budgets, codecs and merges."""
