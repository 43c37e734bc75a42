"""What several programs do: voting, resampling, sharing out a budget."""
