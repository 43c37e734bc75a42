"""Pictures of a timeline, for the terminal, as SVG, PNG, HTML page and trace, in the same colours."""
