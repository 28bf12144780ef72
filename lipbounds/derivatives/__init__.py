"""The calculus of attention: norms of its derivatives, which bounds are put together from."""
