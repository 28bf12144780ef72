"""What the first screen of the page says in sentences, from the aggregates alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench.pages.colours import THE_PAPER
from bench.pages.formatting import figure, length_words
from lipbounds.number_format import counted


TRAINED = ("minilm", "minilm-without-biases", "digits-vit")
Aggregates = dict[str, Any]
Row = dict[str, Any]


def sentences(aggregates: Aggregates) -> list[str]:
    """The answer in at most five sentences; those for which there are no numbers are left out.

    Args:
        aggregates: what `bench.tightness.aggregate.aggregate` returned.
    """
    models = [name for name in TRAINED if name in aggregates["models"]] or list(aggregates["models"])
    proved = {name: _proved(aggregates["models"][name]) for name in models}
    found = [_tightest(proved), _of_the_paper(proved), *findings(aggregates, models[0], THE_PAPER), _sound(aggregates)]
    return [sentence for sentence in found if sentence]


def _proved(model: Row) -> dict[str, float]:
    """The medians of the proved bounds at a point; what served as the truth is not among them."""
    return {row["bound"]: row["median"] for row in model["overall"] if row["kind"] == "proved"}


def _tightest(proved: dict[str, dict[str, float]]) -> str:
    least = {name: min(of, key=of.__getitem__) for name, of in proved.items() if of}
    if not least:
        return ""
    told = ", ".join(f"`{bound}` on {name} ({figure(proved[name][bound])} times)" for name, bound in least.items())
    return f"The proved bound that is nearest to the true constant, by its median over layers and inputs, is {told}."


def _of_the_paper(proved: dict[str, dict[str, float]]) -> str:
    given = {name: of for name, of in proved.items() if THE_PAPER in of}
    if not given:
        return ""
    told = ", ".join(
        f"{figure(of[THE_PAPER])} times the true constant on {name} "
        f"({figure(of[THE_PAPER] / min(of.values()))} times the nearest one)"
        for name, of in given.items()
    )
    return f"The bound of the paper, `{THE_PAPER}`, is {told}."


def findings(aggregates: Aggregates, model: str, bound: str) -> list[str]:
    """What the tables say of one bound on one model, in two sentences: the gain of g_1, and the length of the input.

    Args:
        aggregates: what `bench.tightness.aggregate.aggregate` returned.
        model: its name.
        bound: of a family in `bench.tightness.aggregate.GAIN_FAMILIES`.
    """
    found = aggregates["models"].get(model, {"gain": [], "per_length": []})
    told = []
    gain = [row for row in found["gain"] if row["bound"] == bound]
    if gain:
        told.append(
            f"What the attention distribution gains on {model}: with g_1 of its rows, `{bound}` is "
            f"{_span(row['half_over_g_1'] for row in gain)} times smaller than with the constant 1/2 (medians of the "
            f"layers); with the exact norm of the softmax Jacobian it would be "
            f"{_span(row['g_1_over_exact'] for row in gain)} times smaller still."
        )
    lengths = [row for row in found["per_length"] if bound in row["median"]]
    if len(lengths) > 1:
        listed = ", ".join(f"{figure(row['median'][bound])} at {length_words(row)}" for row in lengths)
        told.append(f"On {model}, the median of `{bound}` over the true constant is {listed} tokens.")
    return told


def _span(values: Iterable[float]) -> str:
    listed = sorted(values)
    return f"{figure(listed[0])} to {figure(listed[-1])}"


def _sound(aggregates: Aggregates) -> str:
    models = aggregates["models"].values()
    if any(model["violations"] for model in models):
        return ""
    upper = [row for model in models for row in model["overall"] if row["kind"] in ("proved", "probable")]
    if not upper:
        return ""
    return (
        f"In {sum(row['count'] for row in upper):,} evaluations of upper bounds at a point, on "
        f"{counted(len(models), 'model')}, "
        "none was below a lower bound of the same block."
    )
