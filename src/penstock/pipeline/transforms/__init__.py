"""The contract ``pipeline.transform`` and its policies: schedules from schedules."""
