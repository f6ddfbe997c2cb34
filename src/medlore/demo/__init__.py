"""Floor 8: what MedLoRE does, on what the installed packages bring along."""
