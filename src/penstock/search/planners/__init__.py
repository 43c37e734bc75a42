"""Planners: which model, how long a text and how many of them a budget is best spent on."""
