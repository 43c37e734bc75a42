"""Conversations: read from data sets, written with a model's own template, stored as tokens, and packed into rows."""
