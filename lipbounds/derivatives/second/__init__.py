"""The second derivative of attention at one input."""
