"""All planted faults by name, and what cannot be planted yet."""

from __future__ import annotations

from verify.faults import (
    controls,
    faults_ball,
    faults_behaviour,
    faults_cheap,
    faults_estimators,
    faults_matrices,
    faults_point,
    faults_published,
    faults_pulled,
    faults_qk_norm,
    faults_rotary,
    faults_sharp,
    faults_sharp_ball,
    faults_single,
    faults_softmax,
    faults_taylor,
    faults_turned_ball,
)
from verify.faults.fault import Fault, faults_in


THEMES = (
    faults_softmax,
    faults_point,
    faults_matrices,
    faults_behaviour,
    faults_ball,
    faults_estimators,
    faults_published,
    faults_rotary,
    faults_pulled,
    faults_qk_norm,
    faults_sharp,
    faults_sharp_ball,
    faults_cheap,
    faults_taylor,
    faults_single,
    faults_turned_ball,
)
FAULTS: dict[str, Fault] = {fault.name: fault for theme in THEMES for fault in faults_in(theme)}
CONTROLS: dict[str, Fault] = {control.name: control for control in faults_in(controls)}
NOT_EXPRESSIBLE = {
    "a certificate that checks one target class only": "there is no certify.py yet (issue 5); a bound knows no classes",
    "K2, K4 for L2 attention": "`Attention` is dot-product attention; their faults are planted in dot-product form",
    "N3, N4 in the RMS norm of tokens": "the verifier knows the truth in the l2 norm; N3 (scale) and N4 are planted in "
    "the l2 norm, where N3 (multi-head) is a sound bound: the control whole_matrices_for_heads",
    "GELU constants 1.12 and 1.1289": "constants of an activation, which a bound of an attention block does not use",
    "greedy split for theta": "theta belongs to bounds in the max-token norm, for which there is no truth yet",
    "an unsupported feature let through": "`BoundSpec.__call__` refuses it before the bound runs; a declared feature "
    "that is ignored is planted (mask_ignored, query_bias_ignored)",
}
