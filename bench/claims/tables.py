"""The page of the task `claims`, with the tables that other pages quote."""

from __future__ import annotations

from collections.abc import Sequence

from bench.claims.rows import MOSTLY, Claim
from bench.pages.formatting import table
from bench.pages.page import bullets, marked_part, page


def report(claims: Sequence[Claim], command: str) -> str:
    """The page of results.

    Args:
        claims: the rows.
        command: that makes the page.
    """
    notes = [
        "Intervals at 95 %: bootstrap over inputs for Spearman's correlations, Student's t over seeds for what "
        "training changes. Training is judged by paired t-tests, corrected by Holm's rule over the tests of its page.",
        f"theta: the claim counts as holding for a model where at least {MOSTLY:.0%} of the rows reach the mark; theta "
        "is counted from below, and from above where the two differ.",
        "`does not show`: the interval holds no effect as well as one; it does not say that there is none. The models "
        "are small or far from those of the papers: nothing is said about others.",
        "Public reports: their figures alone were at hand, neither code nor radius, and their penalty is another one; "
        "`reproduced` where the whole interval lies above their smallest rise, `not reproduced` where all of it lies "
        "below, under the same weak attack (PGD of ten steps). That is not the attack of the worst case.",
        "The claims are in our words: those of Yudin et al. after a summary of the paper, that of Emadi after its "
        "abstract.",
    ]
    parts = [
        "# Claims of the papers, held against the records",
        marked_part("verdicts", verdicts(claims)),
        "With the effects and their intervals:",
        marked_part("claims", listed(claims)),
        f"Made by `{command}` from the records of the other tasks; nothing here is written by hand.",
        bullets(notes),
    ]
    return page(parts)


def verdicts(claims: Sequence[Claim]) -> str:
    """The verdicts alone, a row for each claim and what it was tested on.

    Args:
        claims: the rows.
    """
    body = [
        [f"{claim.words} ({claim.source})", claim.models, f"**{claim.verdict}**", _link(claim.page)] for claim in claims
    ]
    return table(["claim", "tested on", "verdict", "numbers"], body)


def listed(claims: Sequence[Claim]) -> str:
    """The table with the effects.

    Args:
        claims: the rows.
    """
    body = [
        [claim.source, claim.words, f"**{claim.verdict}**", claim.models, claim.effect, _link(claim.page)]
        for claim in claims
    ]
    return table(["whose", "claim", "verdict", "tested on", "effect", "numbers"], body)


def _link(name: str) -> str:
    return f"[{name.removesuffix('.md')}]({name})" if name else "-"
