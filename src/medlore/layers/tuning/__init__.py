"""Tuning methods that PEFT lacks: what each adds to a network, one file per family."""
