"""Floor 2: decisions as data. Reads a model or a weights file, never changes it."""
