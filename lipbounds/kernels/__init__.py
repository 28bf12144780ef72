"""Quantities of attention maps that are too long to be stored."""

from lipbounds.lazy import submodules


__getattr__ = submodules(__name__)
