"""Policies of the contract ``train.tuner``: which weights of a model are trained."""
