"""Plans before runs: hardware, cost models, and what they advise."""
