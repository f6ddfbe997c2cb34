"""Image classifiers: teacher, shared base, one expert per task, and the networks that they have to beat."""
