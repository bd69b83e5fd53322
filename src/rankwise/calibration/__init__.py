"""The statistics that inits, budgets, codecs and merges may ask for: one driver, mergeable accumulators."""
