"""Training a model of which each process holds a shard."""
