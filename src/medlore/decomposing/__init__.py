"""Floor 7: a model becomes a light shared base and one low-rank expert per task."""
