"""Derivatives of attention while the input stays in a ball."""
