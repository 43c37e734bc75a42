"""The engine: who runs, in which memory, and what each step computes."""
