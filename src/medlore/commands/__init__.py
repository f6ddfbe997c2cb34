"""Floor 6: the verbs of the command line, one file a verb, nothing heavy imported on top."""
