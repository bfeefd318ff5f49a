"""Training of a small language model with several optimizers, and the searches for their settings."""
