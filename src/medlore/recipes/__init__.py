"""Floor 5: one readable procedure a file, its settings beside it."""
