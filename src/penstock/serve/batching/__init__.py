"""Batching policies: which sequences the next step works on, and how many tokens of each."""
