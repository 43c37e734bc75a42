"""An engine whose model is divided among several ranks, each a process of its own."""
