"""Controllers: how many tokens are drafted, and how many of those are verified."""
