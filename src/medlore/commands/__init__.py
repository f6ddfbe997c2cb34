"""The commands of the command line, one file per command; nothing heavy is imported at the top."""
