"""Predicts how likely a target is to accept what another model drafts for it."""
