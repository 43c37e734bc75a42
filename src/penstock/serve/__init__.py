"""Serving: continuous batching on a paged cache whose prefixes are shared."""
