"""What is measured: models, architectures, data, and the radii of balls."""
