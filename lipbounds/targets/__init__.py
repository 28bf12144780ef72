"""What can be bounded: frozen data, validated once."""

from lipbounds.lazy import submodules


__getattr__ = submodules(__name__)
