"""Schedules as data: tasks, their placement and order, what makes a schedule valid, and its form as PyTorch's CSV."""
