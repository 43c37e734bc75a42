"""Attention over keys and values that lie in blocks of a shared pool."""
