"""Several engines with the same model behind one address, each in a process of its own."""
