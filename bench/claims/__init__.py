"""The task `claims`: what papers claim of attention and robustness, held against the records of the other tasks."""
