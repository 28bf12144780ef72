"""Hypothesis strategies for attention blocks, radii and rows of logits; hard cases are drawn on purpose.

Two families. Small blocks (at most 3 tokens and 3 features) have every entry drawn by itself from a few dyadic
numbers: ties, zeros and exact cancellation are common, and they shrink to something a person can check by hand.
Larger ones are built from a `Recipe`, a handful of choices and a seed: one example costs Hypothesis some twenty-five
draws whatever its size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from lipbounds.claims import FEATURES, Feature
from lipbounds.errors import InvalidInput
from lipbounds.targets.attention import Attention
from lipbounds.targets.rms_norm import NORM_OVER
from lipbounds.testing._fields import of_some_tokens
from lipbounds.testing.recipes import (
    BATCHED,
    BIASES,
    GEOMETRIES,
    MASKS,
    NORMS,
    REGIMES,
    ROTATIONS,
    SPECTRA,
    Recipe,
    build,
)


T = TypeVar("T")
ALL_FEATURES: frozenset[Feature] = frozenset(FEATURES)
# Hypothesis shrinks towards the front of each of these: the simplest first.
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
DYADIC = (0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5, 3.0, -3.0, 4.0, -4.0, 8.0, -8.0, 16.0, -16.0)
SPREADS = (1.0, 2.0, 0.5, 4.0, 8.0, 16.0, 40.0, 100.0, 1e3, 1e4, 0.1, 1e-2, 1e-4, 1e-8)
SCALES = (None, None, None, 1.0, 1.0, 0.5, -1.0, 4.0, 0.0)
NORM_EPS = (1e-6, 1e-5, 1.0, 0.01, 16.0)
DYADIC_EPS = (1.0, 2.0**-20, 0.25)
MAGNITUDES = (1.0, 1.0, 10.0, 0.1, 1e4, 1e-4)
RADII = (1.0, 0.5, 0.1, 2.0, 0.01, 1e-3, 1e-6, 10.0, 0.0)
# A batch of eight costs little more than one block and holds eight draws of everything that is not a choice.
BATCHES = ((), (), (), (), (1,), (2,), (2, 2), (8,), (8,), (8,))
LARGEST = 32
LARGEST_BATCHED = 64  # tokens times features


def _mostly(first: T, others: Iterable[T], share: int) -> SearchStrategy[T]:
    """`first` as often as `share` of the others together."""
    return st.sampled_from([first] * share + list(others))


# one_of would draw the two alike.
_FAMILIES = st.sampled_from(("small", "generated", "generated"))
_RADII = st.sampled_from(RADII)
_DTYPES = _mostly(torch.float64, DTYPES, 3)
_SPREADS = st.sampled_from(SPREADS)
_MODERATE_SPREADS = st.sampled_from(SPREADS[:6])
_MASKS = _mostly("none", MASKS, 4)
_CROSS_MASKS = _mostly("none", [name for name in MASKS if name != "causal"], 4)
_ROTATIONS = _mostly("none", ROTATIONS, 6)
_NORMS = _mostly("none", NORMS, 6)
_NORM_OVER = st.sampled_from(NORM_OVER)
_NORM_EPS = st.sampled_from(NORM_EPS)
_SPECTRA = _mostly("gaussian", SPECTRA, 5)
# Zero values make the whole Jacobian zero: worth a look, not a tenth of all examples.
_VALUE_SPECTRA = _mostly("gaussian", [*[name for name in SPECTRA if name != "zero"] * 3, "zero"], 12)
_GEOMETRIES = _mostly("gaussian", GEOMETRIES, 6)
_REGIMES = _mostly("free", REGIMES, 4)
_SCALES = st.sampled_from(SCALES)
_MAGNITUDES = st.sampled_from(MAGNITUDES)
_BATCHES = st.sampled_from(BATCHES)
_BATCHED = st.sampled_from(BATCHED)
_GROUPS = {heads: st.sampled_from([g for g in (heads, heads, 1, 2) if heads % g == 0]) for heads in (1, 2, 3, 4)}
_SMALL_EPS = st.sampled_from(DYADIC_EPS)
_SMALL_SCALES = st.sampled_from((1.0, None, -1.0, 0.5))
_CROSS_MOVES = st.sampled_from(("memory", "query"))
_UP_TO = {end: st.integers(1, end) for end in range(1, LARGEST + 1)}
_HEADS = st.sampled_from((1, 1, 2, 2, 3, 4))
_ROUNDED = st.sampled_from((True, False))
_SOME_QUERIES = _mostly(False, [True], 7)
_SEEDS = st.integers(0, 2**24)
_BITS = st.integers(0, 2 ** len(BIASES) - 1)


def radii() -> SearchStrategy[float]:
    """Radii of the ball, from 0 to 10."""
    return _RADII


def dtypes() -> SearchStrategy[torch.dtype]:
    """Floating dtypes, mostly float64: there, nothing but the formula itself can be wrong."""
    return _DTYPES


def spreads() -> SearchStrategy[float]:
    """Differences between the largest and the smallest logit of a row, from 1e-8 to 1e4."""
    return _SPREADS


def masks() -> SearchStrategy[str]:
    """Names of masks and position biases in `recipes.MASKS`."""
    return _MASKS


def spectra() -> SearchStrategy[str]:
    """Names of weight families in `recipes.SPECTRA`."""
    return _SPECTRA


def geometries() -> SearchStrategy[str]:
    """Names of input families in `recipes.GEOMETRIES`."""
    return _GEOMETRIES


def regimes() -> SearchStrategy[str]:
    """Names of attention regimes in `recipes.REGIMES`."""
    return _REGIMES


def sizes(largest: int = LARGEST) -> SearchStrategy[int]:
    """Numbers of tokens or features from 1 to `largest`, mostly below 9."""
    small = [size for size in (1, 1, 2, 2, 2, 3, 3, 4, 5, 6, 8) if size <= largest]
    return st.sampled_from(sorted(small * 16 + list(range(9, largest + 1))))


_SIZES = {end: sizes(end) for end in range(1, LARGEST + 1)}


def logits(largest: int = 16) -> SearchStrategy[Tensor]:
    """One row of logits in float64: dyadic entries, ties, one-hot rows to all digits, hidden keys."""
    special = (*DYADIC, -40.0, -1e4, 1e4, 1e-8, -1e-8, float("-inf"))
    rows = st.lists(st.one_of(st.sampled_from(special), st.floats(-60, 60)), min_size=1, max_size=largest)
    return rows.map(lambda row: torch.tensor(row, dtype=torch.float64)).filter(lambda row: bool(row.isfinite().any()))


def attention_blocks(
    features: Iterable[Feature] = ALL_FEATURES,
    *,
    largest: int = LARGEST,
    batches: bool = True,
    extreme: bool = True,
    dtype: torch.dtype | None = None,
) -> SearchStrategy[Attention]:
    """Attention blocks of both families.

    Args:
        features: what the blocks may have, as a bound declares it in `supports`.
        largest: most tokens and most features.
        batches: whether leading batch dimensions occur.
        extreme: whether logits beyond 16, degenerate weights and degenerate inputs occur.
        dtype: the only dtype; None for float64, float32 and bfloat16.

    Raises:
        InvalidInput: an unknown feature, or sizes out of range.
    """
    chosen = _checked(features, largest)
    generated = recipes(chosen, largest=largest, batches=batches, extreme=extreme, dtype=dtype).map(build)
    families = {"small": small_blocks(chosen, dtype=dtype), "generated": generated}
    blocks = _FAMILIES.flatmap(families.__getitem__) if extreme else generated
    if "some_queries" not in chosen:
        return blocks
    return _SOME_QUERIES.flatmap(lambda some: blocks.flatmap(_of_some_tokens) if some else blocks)


@st.composite
def _of_some_tokens(draw: Callable[..., Any], block: Attention) -> Attention:
    """The block with queries of some of its tokens; cross-attention as it is."""
    if block.memory is not None:
        return block
    order = draw(st.permutations(range(block.tokens)))
    return of_some_tokens(block, torch.tensor(order[: draw(_UP_TO[block.tokens])], dtype=torch.int64))


@st.composite
def small_blocks(
    draw: Callable[..., Any], features: Iterable[Feature] = ALL_FEATURES, *, dtype: torch.dtype | None = None
) -> Attention:
    """Blocks of at most 3 tokens, 3 features and 2 heads with dyadic entries, each drawn by itself.

    Args:
        draw: given by Hypothesis.
        features: what the blocks may have.
        dtype: the only dtype; None for all.
    """
    cross = "cross" in features and draw(st.booleans())
    n, dim, head_dim, value_dim, out_dim = (draw(_UP_TO[3]) for _ in range(5))
    m = draw(_UP_TO[3]) if cross else n
    heads = draw(_UP_TO[2]) if "heads" in features else 1
    shapes: dict[str, Sequence[int]] = {
        "x": (n, dim),
        "w_q": (heads, dim, head_dim),
        "w_k": (heads, dim, head_dim),
        "w_v": (heads, dim, value_dim),
        "w_o": (heads, value_dim, out_dim),
    }
    if cross:
        shapes["memory"] = (m, dim)
    if "biases" in features and draw(st.booleans()):
        shapes |= {"b_q": (heads, head_dim), "b_k": (heads, head_dim), "b_v": (heads, value_dim)}
    normed = "qk_norm" in features and draw(st.booleans())
    if normed:
        shapes |= {"query_norm_weight": (heads, head_dim), "key_norm_weight": (heads, head_dim)}
    turned = "rotary" in features and head_dim > 1 and draw(st.booleans())
    kind = draw(_DTYPES) if dtype is None else dtype
    fields: dict[str, Any] = _dyadic(draw, shapes, kind)
    if "mask" in features and draw(st.booleans()):
        drawn = list(draw(st.binary(min_size=n * m, max_size=n * m)))
        hidden = torch.tensor(drawn, dtype=torch.int64).reshape(n, m) % 2 == 1
        hidden[torch.arange(n), torch.arange(n) % m] = False
        fields["logit_bias"] = torch.zeros(n, m, dtype=kind).masked_fill(hidden, float("-inf"))
    if turned:
        queries = _quarter_turns(draw, n, kind)
        fields |= {"query_rotation": queries, "key_rotation": _quarter_turns(draw, m, kind) if cross else queries}
    if normed:
        fields |= {"norm_eps": draw(_SMALL_EPS), "norm_over": draw(_NORM_OVER)}
    moves = draw(_CROSS_MOVES) if cross else "self"
    return Attention(**fields, moves=moves, scale=draw(_SMALL_SCALES))


def _quarter_turns(draw: Callable[..., Any], tokens: int, dtype: torch.dtype) -> Tensor:
    """Rotations of one pair by multiples of a right angle: exact in every dtype."""
    quarters = [byte % 4 for byte in draw(st.binary(min_size=tokens, max_size=tokens))]
    turns = torch.tensor([[1, 0], [0, 1], [-1, 0], [0, -1]], dtype=dtype)
    return turns[torch.tensor(quarters, dtype=torch.int64)].unsqueeze(-1)


def _dyadic(draw: Callable[..., Any], shapes: dict[str, Sequence[int]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of dyadic entries; one byte an entry is one draw in all, and still shrinks entry by entry."""
    counts = [torch.Size(shape).numel() for shape in shapes.values()]
    drawn = draw(st.binary(min_size=sum(counts), max_size=sum(counts)))
    entries = torch.tensor([DYADIC[byte % len(DYADIC)] for byte in drawn], dtype=dtype)
    parts = entries.split(counts)
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


@st.composite
def recipes(
    draw: Callable[..., Any],
    features: Iterable[Feature] = ALL_FEATURES,
    *,
    largest: int = LARGEST,
    batches: bool = True,
    extreme: bool = True,
    dtype: torch.dtype | None = None,
) -> Recipe:
    """Recipes of blocks; the arguments are those of `attention_blocks`.

    Args:
        draw: given by Hypothesis.
        features: what the blocks may have.
        largest: most tokens and most features.
        batches: whether leading batch dimensions occur.
        extreme: whether logits beyond 16, degenerate weights and degenerate inputs occur.
        dtype: the only dtype; None for all.
    """
    cross = "cross" in features and draw(st.booleans())
    heads = draw(_HEADS) if "heads" in features else 1
    choices: dict[str, Any] = {
        "n": draw(_SIZES[largest]),
        "dim": draw(_SIZES[largest]),
        "heads": heads,
        "groups": draw(_GROUPS[heads]),
        "head_dim": draw(_SIZES[min(8, largest)]),
        "value_dim": draw(_SIZES[min(8, largest)]),
        "out_dim": draw(_SIZES[largest]),
        "tied": draw(st.booleans()),
        "scale": draw(_SCALES),
        "seed": draw(_SEEDS),
        "rounded": draw(_ROUNDED),
        "dtype": draw(_DTYPES) if dtype is None else dtype,
        "spread": draw(_SPREADS if extreme else _MODERATE_SPREADS),
    }
    if cross:
        choices |= {"m": draw(_SIZES[largest]), "moves": draw(_CROSS_MOVES)}
    if "mask" in features:
        choices["mask"] = draw(_CROSS_MASKS if cross else _MASKS)
    if "rotary" in features:
        choices["rotary"] = draw(_ROTATIONS)
    if "qk_norm" in features:
        choices["norm"] = draw(_NORMS)
    if choices.get("norm", "none") != "none":
        choices |= {"norm_over": draw(_NORM_OVER), "norm_eps": draw(_NORM_EPS)}
    if "biases" in features:
        bits = draw(_BITS)
        choices["biases"] = frozenset(name for i, name in enumerate(BIASES) if bits >> i & 1)
        choices["bias_scale"] = draw(_MAGNITUDES) if extreme else 1.0
    if extreme:
        choices |= _extremes(draw)
    if batches and choices["n"] * choices["dim"] <= LARGEST_BATCHED:
        choices["batch"] = draw(_BATCHES)
        choices["batched"] = draw(_BATCHED) if choices["batch"] else BATCHED[0]
    return Recipe(**choices)


def _extremes(draw: Callable[..., Any]) -> dict[str, Any]:
    """The choices that make a block hard."""
    return {
        "geometry": draw(_GEOMETRIES),
        "regime": draw(_REGIMES),
        "query": draw(_SPECTRA),
        "key": draw(_SPECTRA),
        "value": draw(_VALUE_SPECTRA),
        "output": draw(_VALUE_SPECTRA),
        "input_scale": draw(_MAGNITUDES),
    }


def _checked(features: Iterable[Feature], largest: int) -> frozenset[Feature]:
    chosen = frozenset(features)
    unknown = sorted(chosen - ALL_FEATURES)
    if unknown:
        raise InvalidInput(f"features may hold {sorted(ALL_FEATURES)}, got also {unknown}.")
    if not 1 <= largest <= LARGEST:
        raise InvalidInput(f"largest must be between 1 and {LARGEST}, got largest={largest}.")
    return chosen
