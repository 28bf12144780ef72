"""What the command line runs: one task a file, `run(options)` with the exit status."""
