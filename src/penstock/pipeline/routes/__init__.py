"""Policies of the contract ``pipeline.route``: paths of microbatches through the stages."""
