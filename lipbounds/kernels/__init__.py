"""Quantities of attention maps that are too long to be stored."""
