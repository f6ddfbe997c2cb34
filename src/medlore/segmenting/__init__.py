"""Floor 7: text-prompted segmentation of volumes, on the grid of each image."""
