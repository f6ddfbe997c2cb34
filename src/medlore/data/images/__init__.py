"""2D images: sets, lists, tables, folders, few-shot draws, batches."""
