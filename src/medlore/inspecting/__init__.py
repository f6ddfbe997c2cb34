"""Floor 6: what a machine, a file, a folder or a set of weights is."""
