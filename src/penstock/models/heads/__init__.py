"""Policies of the contract `model.head`: what drafts with a model's own layers or hidden states."""
