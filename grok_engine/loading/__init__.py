"""From a checkpoint to a model, and back."""
