"""The first derivative of attention at one input."""
