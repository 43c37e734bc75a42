"""Evaluation: what a model can do, measured on tasks, with intervals and paired comparisons."""
