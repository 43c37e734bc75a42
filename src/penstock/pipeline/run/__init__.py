"""Runs a schedule on processes, and owns what a step holds: parts of a model, messages, activations, sums."""
