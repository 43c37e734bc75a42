"""Policies of the contract ``pipeline.transform``: schedules from schedules."""
