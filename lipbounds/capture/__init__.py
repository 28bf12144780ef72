"""The attention blocks of any torch model, found by watching it run once.

No code here knows a model architecture. The steps between a projection and an attention call are recorded, and run
again on the numbers of tokens and features to learn which weight belongs to which head.
"""

from __future__ import annotations

from lipbounds.capture.blocks import Captured as Captured
from lipbounds.capture.blocks import CapturedAttention as CapturedAttention
from lipbounds.capture.blocks import Skipped as Skipped
from lipbounds.capture.run import capture as capture
from lipbounds.lazy import make_callable, submodules


make_callable(__name__, "capture")
__getattr__ = submodules(__name__)
