"""Mathematics owned by no paper."""

from lipbounds.lazy import submodules


__getattr__ = submodules(__name__)
