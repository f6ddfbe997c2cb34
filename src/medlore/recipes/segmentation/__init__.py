"""Training text-prompted segmenters: a teacher, its lighter student with one expert a region, experts added later, few-shot tuning."""
