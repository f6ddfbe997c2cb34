"""Programs of the maintainers: how the shipped models were made and judged. Not part of the wheel."""
