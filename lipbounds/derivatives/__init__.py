"""The calculus of attention: norms of its derivatives, which bounds are put together from."""

from lipbounds.lazy import submodules


__getattr__ = submodules(__name__)
