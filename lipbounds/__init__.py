"""Compare, verify and use local Lipschitz bounds of transformers.

Find the attention of a model, and bound it:

    Attention              one attention block at one input: weights, tokens, mask
    capture                the attention blocks of a model at an input, without an adapter
    bounds                 every bound by name: bounds.sharp(block), bounds.yudin2025.biased(block)
    get, select            a bound by its name; those that match a kind, scope, norm or block
    truth                  the exact norm of the Jacobian, or a certificate where the block is large
    compare                bounds of a model side by side, as a table, figure, CSV or LaTeX
    report                 which layers and heads are fragile, as one HTML file

Whole models and training:

    network_bound          a bound of a network from the bounds of its layers
    whole_model_constant   the constant of a whole model at an input, bracketed
    certify                l2 radii within which a classifier cannot change its answer
    JaSMin                 the penalty of Yudin et al. 2025, for training
    LipschitzMonitor       the constants of the layers of a model while it is trained
    load_model             a bundled or Hugging Face model by name
    keep_weight_norms      norms of weights are computed once inside a `with` block

Bounds of your own, and what every number carries:

    bound                  decorator: a function becomes a registered bound
    refuted                published formulas that are no bounds
    BoundSpec              a registered bound: what it promises, and how it is computed
    BoundResult            a number with its promise
    Claim, Source          the promise; where the formula is from
    Comparison             what compare returns
    LipboundsError         base of InvalidInput, Unsupported, UnsupportedAttention, UnknownBound

The names are imported at their first use, because torch takes seconds to import. Submodules are found the same way:
`lipbounds.targets.network.Network` needs no import but that of `lipbounds`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lipbounds.lazy import submodules


if TYPE_CHECKING:
    from lipbounds import bounds as bounds
    from lipbounds.bound_spec import BoundSpec as BoundSpec
    from lipbounds.capture import capture as capture
    from lipbounds.certify import certify as certify
    from lipbounds.claims import BoundResult as BoundResult
    from lipbounds.claims import Claim as Claim
    from lipbounds.claims import Source as Source
    from lipbounds.comparison import Comparison as Comparison
    from lipbounds.comparison import compare as compare
    from lipbounds.comparison import truth as truth
    from lipbounds.compose import network_bound as network_bound
    from lipbounds.errors import InvalidInput as InvalidInput
    from lipbounds.errors import LipboundsError as LipboundsError
    from lipbounds.errors import UnknownBound as UnknownBound
    from lipbounds.errors import Unsupported as Unsupported
    from lipbounds.errors import UnsupportedAttention as UnsupportedAttention
    from lipbounds.estimators.whole_model import whole_model_constant as whole_model_constant
    from lipbounds.jasmin import JaSMin as JaSMin
    from lipbounds.models.loading import load_model as load_model
    from lipbounds.monitor import LipschitzMonitor as LipschitzMonitor
    from lipbounds.registry import bound as bound
    from lipbounds.registry import get as get
    from lipbounds.registry import refuted as refuted
    from lipbounds.registry import select as select
    from lipbounds.report import write_report as report  # noqa: F401
    from lipbounds.targets.attention import Attention as Attention
    from lipbounds.targets.weight_norms import keep_weight_norms as keep_weight_norms

__version__ = "0.1.0"

# The module of each name; None for a submodule, three of which are called as the function that has their name.
_WHERE: dict[str, str | None] = {
    "Attention": "targets.attention",
    "BoundResult": "claims",
    "BoundSpec": "bound_spec",
    "Claim": "claims",
    "Comparison": "comparison",
    "InvalidInput": "errors",
    "JaSMin": "jasmin",
    "LipboundsError": "errors",
    "LipschitzMonitor": "monitor",
    "Source": "claims",
    "UnknownBound": "errors",
    "Unsupported": "errors",
    "UnsupportedAttention": "errors",
    "bound": "registry",
    "bounds": None,
    "capture": None,
    "certify": None,
    "compare": "comparison",
    "get": "registry",
    "keep_weight_norms": "targets.weight_norms",
    "load_model": "models.loading",
    "network_bound": "compose",
    "refuted": "registry",
    "report": None,
    "select": "registry",
    "truth": "comparison",
    "whole_model_constant": "estimators.whole_model",
}

__all__ = ["__version__", *_WHERE]  # pyright: ignore[reportUnsupportedDunderAll]

_submodule = submodules(__name__)


def __getattr__(name: str) -> Any:
    module = _WHERE.get(name)
    if module is None:
        return _submodule(name)
    found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return found


def __dir__() -> list[str]:
    return [*__all__]
