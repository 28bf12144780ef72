"""From which images stand to what the page says of classifiers: accuracies with intervals, and paired comparisons."""

from __future__ import annotations

from typing import Any

from bench.robustness.proportions import clopper_pearson, difference, discordant, mcnemar
from bench.robustness.statistics import holm


Data = dict[str, Any]


def summarised(data: Data) -> Data:
    """Accuracies of every model, and comparisons of each with the first one, corrected by Holm's rule together.

    Args:
        data: what `bench.robustness.classifier_task.shown` returned.
    """
    first = _columns(data["models"][0])
    comparisons = []
    for model in data["models"][1:]:
        for column, flags in _columns(model).items():
            more, fewer = discordant(flags, first[column])
            low, high = difference(more, fewer, len(flags))
            comparisons.append(
                {
                    **{"model": model["model"], "column": column, "more": more, "fewer": fewer},
                    **{"difference": (more - fewer) / len(flags), "low": low, "high": high},
                    "p": mcnemar(more, fewer),
                }
            )
    for row, corrected in zip(comparisons, holm([row["p"] for row in comparisons]), strict=True):
        row["corrected"] = corrected
    return {"models": [_accuracies(model) for model in data["models"]], "comparisons": comparisons}


def column_name(norm: str, eps: float) -> str:
    """What the columns of tables are called, such as "l_inf 8/255" and "l2 0.5".

    Args:
        norm: of the ball.
        eps: its radius.
    """
    return f"{norm} {radius_words(norm, eps)}"


def radius_words(norm: str, eps: float) -> str:
    """A radius; one of l_inf in grey levels of 255, where it is a whole number of them.

    Args:
        norm: of the ball.
        eps: its radius.
    """
    levels = round(255 * eps)
    return f"{levels}/255" if norm == "l_inf" and abs(255 * eps - levels) < 1e-9 and levels else f"{eps:.4g}"


def _columns(model: Data) -> dict[str, list[bool]]:
    """Which images stand, as they are and after every attack of each radius."""
    found = {"clean": model["clean"]}
    for norm, rows in model["robust"].items():
        found |= {column_name(norm, row["eps"]): row["worst"] for row in rows}
    return found


def _accuracies(model: Data) -> Data:
    """By column: the share, and its interval."""
    found = {}
    for column, flags in _columns(model).items():
        low, high = clopper_pearson(sum(flags), len(flags))
        found[column] = {"share": sum(flags) / len(flags), "low": low, "high": high}
    return {"model": model["model"], "accuracies": found}
