"""Speculation: tokens that are drafted ahead, for one pass of the model to check together."""
