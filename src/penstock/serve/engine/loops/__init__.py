"""Loops: the order of scheduling, computing and publishing."""
