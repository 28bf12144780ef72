"""Whether a page shows what its code prints: the same words, and the same numbers but for the last digits."""

from __future__ import annotations

import doctest
import re


NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(?:e[+-]?\d+)?")
CLOSE = 0.02  # machines differ in the last digits of what a model computes, and pages show few
VARY = "<!-- numbers vary -->"  # before a block whose numbers depend on the machine: only their places are compared


def is_shown(want: str, got: str, *, vary: bool = False) -> bool:
    """Whether the block of a page is what its code prints.

    Args:
        want: what the page shows. `...` stands for anything, the numbers in a column `seconds` for any others.
        got: what is printed.
        vary: whether all numbers may be others.
    """
    if "..." in want:
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        return doctest.OutputChecker().check_output(want, got, flags)
    wanted, printed = ([line.split() for line in text.strip().split("\n")] for text in (want, got))
    if [len(words) for words in wanted] != [len(words) for words in printed]:
        return False
    is_timed = False
    for left, right in zip(wanted, printed, strict=True):
        if not left:
            is_timed = False
            continue
        count = len(left) - 1 if is_timed and NUMBER.fullmatch(left[-1]) else len(left)
        is_timed = left[-1] == "seconds" or (is_timed and count < len(left))
        if not all(_same(one, other, vary) for one, other in zip(left[:count], right[:count], strict=True)):
            return False
    return True


def _same(one: str, other: str, vary: bool) -> bool:
    if NUMBER.sub("0", one) != NUMBER.sub("0", other):
        return False
    pairs = zip(NUMBER.findall(one), NUMBER.findall(other), strict=True)
    return vary or all(_close(float(a.replace(",", "")), float(b.replace(",", ""))) for a, b in pairs)


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= CLOSE * max(abs(a), abs(b))
