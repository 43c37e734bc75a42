"""How many sequences to decode at a time."""
