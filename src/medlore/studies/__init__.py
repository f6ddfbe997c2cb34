"""Floor 8: a grid of tuning runs in one YAML file, run once each, compared draw by draw."""
