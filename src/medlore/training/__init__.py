"""Floor 6: the one training engine."""
