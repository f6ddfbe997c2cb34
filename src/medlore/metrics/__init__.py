"""Floor 4: numbers that say how good a result is, with intervals."""
