"""The bibliography (``papers.toml``) and where each paper stands: planned, simulated, implemented or measured."""
