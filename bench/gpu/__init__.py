"""What a machine with a GPU is asked in the ten minutes for which it is at hand."""
