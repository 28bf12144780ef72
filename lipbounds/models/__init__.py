"""Reference models that bounds are compared on; each module needs the extra `lipbounds[models]`."""
