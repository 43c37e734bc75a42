"""What is reused of contexts that are no prefix."""
