"""The tasks `speed`, `training` and `scaling`: time and memory."""
