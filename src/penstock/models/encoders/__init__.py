"""Encoders: models that read a text as a whole, and give a vector for it."""
