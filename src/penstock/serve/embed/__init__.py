"""Vectors of texts, by encoders and by decoders."""
