"""Fine-tuning beside serving."""
