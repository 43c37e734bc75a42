"""Policies of the contract ``weight.format``: matrices in few bits, and products with them."""
