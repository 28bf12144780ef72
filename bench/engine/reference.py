"""The truth that bounds are held against: the exact norm of small blocks, and Lanczos until it has converged."""

from __future__ import annotations

from bench.engine.schedule import Chain, Method
from lipbounds import registry


TASK = "tightness"  # the task whose records hold the reference
SMALL = 1200  # largest dimension of a block that is measured by every estimator, the dense Jacobian included
LOWER = "lanczos"
CERTIFICATE = "lanczos_certificate"
STEPS = (30, 60, 120, 240)  # of Lanczos from below: the next number is tried while the residual is too large
LARGEST_RESIDUAL = 1e-6
CERTIFICATE_OPTIONS = {"delta": 1e-9, "steps": 60}  # 2 to 3 % above the truth in dimensions up to 50 000


def converged_lanczos() -> Chain:
    """The lower bound, with more steps until the Ritz vector is an eigenvector for all that matters."""
    for steps in STEPS:
        record = yield Method(registry.get(LOWER), {"steps": steps})
        if record.status != "ok" or record.details.get("residual", 0.0) <= LARGEST_RESIDUAL:
            return
