"""Floor 1: pure tensor mathematics. Torch, NumPy and SciPy only; no modules, no files, no hidden randomness."""
