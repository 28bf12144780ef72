"""What tables and figure share: rows of a method, and shares of images."""

from __future__ import annotations

from typing import Any


Data = dict[str, Any]
METHODS = ("taylor", "joint", "product")


def certified(model: Data, method: str) -> list[Data]:
    """The rows of one method in the l2 norm.

    Args:
        model: of the data of the page.
        method: of `certify`.
    """
    return in_norm([row for row in model["certificates"] if row["method"] == method], "l2")


def in_norm(rows: list[Data], norm: str) -> list[Data]:
    """The rows of one norm.

    Args:
        rows: certified or published.
        norm: of the balls.
    """
    return [row for row in rows if row.get("norm", "l2") == norm]


def share_of(rows: list[Data], radius: float) -> float:
    """Certified accuracy: the share that is right all over the ball of that radius.

    Args:
        rows: of one method.
        radius: of the ball.
    """
    return sum(row["correct"] and row["radius"] >= radius for row in rows) / len(rows)


def left_by_smallest(model: Data, radius: float) -> float | None:
    """The share of images that are right and have no image of another class within the radius that was found.

    Args:
        model: of the data of the page.
        radius: of the ball.
    """
    distances = [value for one in model["smallest"] for value in one["distances"]]
    if not distances:
        return None
    return sum(value is None or value > radius for value in distances) / len(distances)
