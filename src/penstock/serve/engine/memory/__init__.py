"""The memory of sequences: who has a slot and which blocks, and nobody else changes them."""
