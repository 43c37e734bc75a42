"""Ways to order the tasks of a schedule, shared by policies: building blocks, list scheduling, zero-bubble search."""
