"""Chat formats: how models write what they think, what they say, and which functions they call."""
