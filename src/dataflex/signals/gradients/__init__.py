"""Per-sample gradients of the parameters under training: exact, batched, and harmless to training."""
