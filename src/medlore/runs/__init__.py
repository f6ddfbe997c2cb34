"""Floor 5: what every run shares: settings, report, lock, hardware, worker pool."""
