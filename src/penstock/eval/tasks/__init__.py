"""Tasks: one a file, none needs a download."""
