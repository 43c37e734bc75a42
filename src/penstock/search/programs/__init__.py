"""Search programs, one a file."""
