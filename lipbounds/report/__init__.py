"""Which layers and heads of a model are fragile, and why: as data, as JSON and as one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lipbounds.lazy import make_callable, submodules
from lipbounds.report.as_json import from_json as from_json
from lipbounds.report.as_json import to_json as to_json
from lipbounds.report.measure import ModelInput as ModelInput
from lipbounds.report.measure import measure as measure
from lipbounds.report.page import write_page as write_page
from lipbounds.report.schema import ModelReport as ModelReport


def write_report(
    model: nn.Module, inputs: Sequence[ModelInput] | Tensor, path: str | Path, **options: Any
) -> ModelReport:
    """Measure a model and write the page; returns what it holds.

    Args:
        model: in evaluation mode.
        inputs: what it is run on; the items of a tensor are run one by one.
        path: of the HTML file.
        **options: of `measure`.

    Raises:
        InvalidInput: an argument breaks a rule of `measure` or `write_page`.
        Unsupported: no attention is found, or one that cannot be expressed.
    """
    report = measure(model, inputs, **options)
    write_page(report, path)
    return report


make_callable(__name__, "write_report")
__getattr__ = submodules(__name__)
