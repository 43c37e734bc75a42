"""The contract ``pipeline.schedule`` and its policies: who does what, and in which order."""
