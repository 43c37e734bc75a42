"""The order in which blocks that nobody holds leave the prefix tree, one policy a file."""
