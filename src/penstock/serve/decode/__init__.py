"""Decoding rules: how scores become a choice, beyond temperature and cuts."""
