"""Adapters: small additions to a model's matrices that are trained in their place."""
