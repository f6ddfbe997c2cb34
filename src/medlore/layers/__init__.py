"""Floor 3: modules, and the surgery that installs, merges and removes them."""
