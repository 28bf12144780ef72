"""Whole models as networks of the layers in lipbounds.targets.layers, one file a family, each checked."""

from lipbounds.lazy import submodules


__getattr__ = submodules(__name__)
