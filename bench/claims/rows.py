"""The claims with what the records of each task say about them."""

from __future__ import annotations

import dataclasses as dc
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from bench.attention.findings import interval
from bench.attention.links import AT_LENGTH, CONSTANT, MEAN, Data, Link, arrays, links
from bench.attention.task import PROFILES as ATTENTION_PROFILES
from bench.attention.task import shown as attention_shown
from bench.engine.answers import Shown
from bench.engine.task import file_of
from bench.pages.formatting import figure
from bench.pretrained.measures import NEAR_ONE
from bench.pretrained.task import BLOCK
from bench.pretrained.task import shown as pretrained_shown
from bench.robustness.command import numbers_of
from bench.robustness.settings import CLEAN_LOSS, reference_of
from bench.robustness.summary import WEAK, summarised, verdict
from bench.robustness.tables import change
from lipbounds.number_format import counted


PAPER, EMADI, PUBLIC = "Yudin et al. 2025", "Emadi 2026", "public reports"
REPORTED = 0.1  # the smallest rise that they state, as a share
G_1, HALF = "yudin2025.biased", "yudin2025.biased_half"
VERDICTS = {"holds": "holds", "the opposite": "contradicted", "not seen": "does not show"}
MOSTLY, HARDLY = 0.95, 0.05  # shares of the rows


@dc.dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim and what was found.

    Args:
        source: whose it is.
        words: the claim.
        models: it was tested on.
        effect: with interval.
        verdict: `holds`, `does not show`, `contradicted`, `mixed` with counts, or `not tested`.
        page: with all numbers, in `results/`; empty for none.
    """

    source: str
    words: str
    models: str
    effect: str
    verdict: str
    page: str = ""


NOT_TESTED = Claim(
    source=EMADI,
    words="What makes training stable is the architecture, and not the dynamics of attention",
    models="-",
    effect="-",
    verdict="not tested: no training of that kind was run",
)


def of_attention(results: Path) -> list[Claim]:
    """What the task `attention` says, across inputs at fixed weights; nothing where it was not measured.

    Args:
        results: the folder of records.
    """
    page = "attention.md"
    found = _page(results, "attention")
    if found is None:
        return []
    data = attention_shown(found, ATTENTION_PROFILES["standard"])
    chains = {name: links(data, name) for name in data["models"]}
    gains = {name: arrays(model) for name, model in data["models"].items()}
    gain = {name: [*(of[HALF] / of[G_1]).ravel().tolist()] for name, of in gains.items() if {HALF, G_1} <= of.keys()}
    return [
        _gain(gain, page),
        _linked(
            "Inputs whose rows have a smaller g_1 have smaller local constants of the blocks",
            chains,
            f"blocks: {MEAN} with the {CONSTANT}",
            page,
        ),
        _linked(
            "Inputs whose rows have a smaller g_1 are harder to fool", chains, f"images: {MEAN} with the pert", page
        ),
    ]


def _gain(ratios: Mapping[str, Sequence[float]], page: str) -> Claim:
    """The gain of g_1 over the constant 1/2 in the bound of the paper, over blocks."""
    cells = [
        f"{name} x {figure(median(values))} [{figure(min(values))}, {figure(max(values))}]"
        for name, values in ratios.items()
    ]
    smallest = min((median(values) for values in ratios.values()), default=math.nan)
    return Claim(
        source=PAPER,
        words="With g_1 of the rows the bound is smaller than with the constant 1/2",
        models=", ".join(ratios),
        effect=f"bound with 1/2 over bound with g_1, median [smallest, largest] over blocks: {'; '.join(cells)}",
        verdict="holds" if smallest > 1 else "does not show",
        page=page,
    )


def _linked(words: str, chains: dict[str, list[Link]], start: str, page: str) -> Claim:
    """One link of the explanation at all models that have it; the length of the input held fixed where it varies."""
    cells, verdicts, models = [], [], []
    for name, chain in chains.items():
        given = [link for link in chain if link.words.startswith(start)]
        for link in [link for link in given if link.words.endswith(AT_LENGTH)] or given:
            norm = link.words.rpartition(", ")[2] if "perturbation" in link.words else ""
            cells.append(f"{name}{f' ({norm})' if norm else ''} {interval(link.found)}")
            verdicts.append(VERDICTS[link.found.verdict(link.sign)])
            models.append(name)
    return Claim(
        source=PAPER,
        words=words,
        models=", ".join(dict.fromkeys(models)),
        effect=f"Spearman [95 %]: {'; '.join(cells)}",
        verdict=_together(verdicts),
        page=page,
    )


def _together(verdicts: Iterable[str]) -> str:
    """One verdict where all agree, and else the counts."""
    counts = Counter(verdicts)
    if len(counts) == 1:
        return next(iter(counts))
    return "mixed: " + ", ".join(f"{verdict} in {count}" for verdict, count in counts.items())


def of_robustness(results: Path) -> list[Claim]:
    """What training with JaSMin does, from every study there is.

    Args:
        results: the folder of records.
    """
    store = file_of(results, "robustness")
    claims = []
    for page in store.pages.values():
        if page.data["profile"] == "quick" or page.data.get("own"):
            continue
        data = numbers_of(Shown(store, page))
        compared = [
            row
            for row in summarised(data)["comparisons"]
            if row["setting"].startswith("jasmin") and row["reference"] == reference_of(row["setting"])
        ]
        study = data.get("study", {"name": "", "about": "digits"})
        images = re.sub(r" \([^)]*\)", "", study["about"].partition(";")[0])  # without authors and licence
        of = f"ViT on {images}, {counted(len(data['seeds']), 'seed')}"
        of += ", attacked by FGSM and PGD alone" * (data.get("attack") == "")
        where = f"{'_'.join(filter(None, ('robustness', study['name'])))}.md"
        titles = {key: setting["title"] for key, setting in data["settings"].items()}
        claims += [_trained(words, sign, measures, compared, of, where, titles) for words, sign, measures in TRAINED]
        claims += _reported(compared, of, where, titles)
    return claims


def _reported(compared: list[Data], models: str, page: str, titles: dict[str, str]) -> list[Claim]:
    """The rise under a weak attack that others report, beside that in the worst case of the same ball."""
    by_measure = {(row["setting"], row["measure"]): row for row in compared}
    cells, verdicts = [], []
    for (setting, measure), row in by_measure.items():
        if not measure.endswith(f" {WEAK}") or row["half"] is None:
            continue
        ball = measure.removesuffix(f" {WEAK}")
        worst = by_measure[setting, f"{ball} worst"]
        cells.append(f"{titles[setting]}: {ball}, weak PGD {_effect(row)}, worst case {_effect(worst)}")
        low, high = row["mean"] - row["half"], row["mean"] + row["half"]
        verdicts.append(
            "reproduced" if low >= REPORTED else "not reproduced" if high < REPORTED else "open: 10 points are possible"
        )
    words = (
        "A related penalty on attention raises accuracy under PGD on MNIST: by 21 points in one student project, by "
        "10 to 15 % in others"
    )
    if not cells:
        return []
    verdict, effect = _together(verdicts), "; ".join(cells)
    return [Claim(source=PUBLIC, words=words, models=models, effect=effect, verdict=verdict, page=page)]


# What JaSMin is claimed to change, with the sign, and the measures that tell.
TRAINED = (
    ("JaSMin lowers the local constants of the attention blocks", -1, ("blocks",)),
    ("JaSMin lowers the local constant of the network", -1, ("network",)),
    ("JaSMin raises accuracy under attack", 1, ("worst", "weak")),
    ("JaSMin costs no clean accuracy", 0, ("clean",)),
)


def _trained(
    words: str,
    sign: int,
    measures: tuple[str, ...],
    compared: list[Data],
    models: str,
    page: str,
    titles: dict[str, str],
) -> Claim:
    rows = [row for row in compared if row["measure"].rpartition(" ")[2] in measures]
    cells = [f"{titles[row['setting']]}: {_measure(row)}{_effect(row)}" for row in rows]
    verdicts = [_verdict(row, sign) for row in rows]
    return Claim(
        source=PAPER, words=words, models=models, effect="; ".join(cells), verdict=_together(verdicts), page=page
    )


def _measure(row: Data) -> str:
    name = row["measure"].replace(" worst", ", worst case").replace(" weak", ", weak PGD")
    return f"{name} " if row["family"] == "accuracies" and row["measure"] != "clean" else ""


def _effect(row: Data) -> str:
    return change(row) + " points" * (row["family"] == "accuracies")


def _verdict(row: Data, sign: int) -> str:
    """What the corrected test says of the claimed sign; 0 claims no fall: the interval must exclude one of a point."""
    said = verdict(row)
    if said == "not tested":
        return "not tested (one seed)"
    if sign == 0:
        kept = row["mean"] - row["half"] >= -CLEAN_LOSS
        return "contradicted" if said == "lower" else "holds" if kept else "open: the interval allows a loss"
    claimed = "higher" if sign > 0 else "lower"
    return "does not show" if said == "no significant difference" else "holds" if said == claimed else "contradicted"


def of_pretrained(results: Path) -> list[Claim]:
    """What the pretrained models say; nothing where they were not measured.

    Args:
        results: the folder of records.
    """
    page = "pretrained.md"
    found = _page(results, "pretrained")
    if found is None:
        return []
    blocks: dict[str, list[Any]] = {name: of[BLOCK] for name, of in pretrained_shown(found).items()}
    gain = {name: [of["bounds"][HALF] / of["bounds"][G_1] for of in found] for name, found in blocks.items()}
    return [_gain(gain, page), _theta(blocks, page)]


def _theta(blocks: dict[str, list[Any]], page: str) -> Claim:
    cells, verdicts = [], []
    for name, of in blocks.items():
        rows = sum(block["rows"] for block in of)
        low, high = (sum(block["theta_near_1"][end] * block["rows"] for block in of) / rows for end in (0, 1))
        layers = sorted({block["layer"] for block in of})
        by_layer = [fmean(block["theta_mean"][0] for block in of if block["layer"] == layer) for layer in layers]
        share = f"{100 * low:.1f} %" if round(low, 3) == round(high, 3) else f"{100 * low:.1f} to {100 * high:.1f} %"
        cells.append(
            f"{name}: {share} of the rows reach {NEAR_ONE:g}, mean by layer {figure(min(by_layer))} to "
            f"{figure(max(by_layer))}"
        )
        verdicts.append(
            "holds" if low >= MOSTLY else "contradicted" if high <= HARDLY else "holds for a part of the rows"
        )
    return Claim(
        source=EMADI,
        words="theta, the balanced-mass factor, is about 1 (there: with 774 M parameters, throughout training)",
        models=", ".join(blocks),
        effect="; ".join(cells),
        verdict=_together(verdicts),
        page=page,
    )


def _page(results: Path, task: str) -> Shown | None:
    store = file_of(results, task)
    page = store.pages.get("standard")
    return None if page is None else Shown(store, page)
