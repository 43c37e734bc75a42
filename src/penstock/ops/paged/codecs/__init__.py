"""Codecs of the paged cache: how the keys and values of tokens lie in its blocks."""
