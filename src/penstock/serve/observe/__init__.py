"""What is told of an engine's decisions: by request, in words, in the log, and as a trace."""
