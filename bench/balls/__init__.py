"""The task `balls`: bounds on a ball as curves over its radius."""
