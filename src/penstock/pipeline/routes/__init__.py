"""The contract ``pipeline.route`` and its policies: paths of microbatches through the stages."""
