"""What stands in a model while it runs: adapters, the views that switch them, and what an adapted module computes."""
