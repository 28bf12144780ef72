"""Wrong bounds on purpose: what the verifier must refute, so that passing it means something."""
