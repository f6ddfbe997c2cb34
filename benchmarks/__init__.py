"""One file a benchmark: ratios against the alternative, measured side by side in one run. `python -m benchmarks` lists them."""
