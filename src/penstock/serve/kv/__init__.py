"""The memory of keys and values: blocks, who holds them, and what they hold."""
