"""Text-prompted segmenters: teacher, lighter student with one expert a region, experts added later, few-shot tuning."""
