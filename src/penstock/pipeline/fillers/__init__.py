"""Policies of the contract ``pipeline.filler``: work for idle devices."""
