"""2D backbones: one door, key maps of other projects, statistics, sizes."""
