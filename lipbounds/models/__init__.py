"""Reference models that bounds are compared on; each module needs the extra `lipbounds[models]`."""

from lipbounds.lazy import submodules


__getattr__ = submodules(__name__)
