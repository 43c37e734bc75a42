"""Steps on the device: planned as arrays, executed by the model over its cache."""
