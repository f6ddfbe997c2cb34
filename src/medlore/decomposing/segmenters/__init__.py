"""Text-prompted segmenters: teacher, lighter student with one expert per region, experts added later, few-shot tuning."""
