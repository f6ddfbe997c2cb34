"""Volumes: geometry, files, grey values, windows, masks, and what a segmenter is trained on."""
