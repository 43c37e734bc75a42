"""The contract ``pipeline.filler`` and its policies: work for idle devices."""
