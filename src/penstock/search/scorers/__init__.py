"""Scorers: what a text is worth."""
