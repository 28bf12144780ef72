"""The public names of `lipbounds`, and nothing else."""

from lipbounds.claims import BoundResult as BoundResult
from lipbounds.claims import Claim as Claim
from lipbounds.claims import Source as Source
from lipbounds.errors import InvalidInput as InvalidInput
from lipbounds.errors import LipboundsError as LipboundsError
from lipbounds.errors import UnknownBound as UnknownBound
from lipbounds.errors import Unsupported as Unsupported
from lipbounds.errors import UnsupportedAttention as UnsupportedAttention
from lipbounds.registry import BoundSpec as BoundSpec
from lipbounds.registry import bound as bound
from lipbounds.registry import get as get
from lipbounds.registry import refuted as refuted
from lipbounds.registry import select as select
from lipbounds.targets.attention import Attention as Attention
