"""Floor 4: images, volumes, lists and draws."""
