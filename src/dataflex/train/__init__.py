"""The training path: plans served through the Trainer, weighted losses, checkpoints."""
