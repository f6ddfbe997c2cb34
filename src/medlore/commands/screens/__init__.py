"""What a person sees: progress on stderr, tables or one JSON object on stdout."""
