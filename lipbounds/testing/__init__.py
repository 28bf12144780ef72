"""Tools that verify a bound, ours or a stranger's; they need the packages of the extra `verify`."""

from lipbounds.testing.contract import CHECKS as CHECKS
from lipbounds.testing.contract import Check as Check
from lipbounds.testing.contract import Refuted as Refuted
from lipbounds.testing.contract import checks_for as checks_for
from lipbounds.testing.contract import load_spec as load_spec
from lipbounds.testing.contract import run_check as run_check
from lipbounds.testing.contract import suite_for as suite_for
from lipbounds.testing.extended import jacobian_norm_extended as jacobian_norm_extended
from lipbounds.testing.oracles import attention_output as attention_output
from lipbounds.testing.oracles import jacobian_norm as jacobian_norm
from lipbounds.testing.oracles import truth_slack as truth_slack
from lipbounds.testing.pretend_accelerator import pretend_device as pretend_device
from lipbounds.testing.pretend_accelerator import synchronisations as synchronisations
from lipbounds.testing.recipes import Recipe as Recipe
from lipbounds.testing.recipes import build as build
from lipbounds.testing.session import verify as verify
from lipbounds.testing.strategies import attention_blocks as attention_blocks
