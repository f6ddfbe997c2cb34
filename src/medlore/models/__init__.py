"""Floor 4: networks, their published names, and what is read from and written to weight files."""
