"""Drafters: where tokens that may follow come from."""
