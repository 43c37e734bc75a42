"""Policies of the contract ``speculate.verifier``: how drafted tokens become the one that comes out."""
