"""What a run trains on, and is measured by: the texts of a token store, or the examples of a data set."""
