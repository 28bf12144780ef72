"""Bounds of the attention of a model side by side, with the truth."""

from __future__ import annotations

from lipbounds.comparison.ground_truth import cost as cost
from lipbounds.comparison.ground_truth import truth as truth
from lipbounds.comparison.measure import compare as compare
from lipbounds.comparison.row import Row as Row
from lipbounds.comparison.table import Comparison as Comparison
from lipbounds.lazy import submodules


__getattr__ = submodules(__name__)
