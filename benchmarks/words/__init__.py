"""The second testbed: words of three characters, read by a recogniser that knows nothing of it."""
