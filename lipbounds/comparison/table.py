"""A comparison as data, and as text, HTML, LaTeX, CSV, JSON and a data frame."""

from __future__ import annotations

import csv
import dataclasses as dc
import html
import io
import math
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from lipbounds.claims import SCOPE_WORDS, Kind
from lipbounds.comparison.plot import plot
from lipbounds.comparison.row import Group, Row
from lipbounds.errors import LipboundsError
from lipbounds.files import json_text, write_atomically
from lipbounds.number_format import counted, shown


SCHEMA_VERSION = 1
DIGITS = 4
KIND_ORDER = ("proved", "probable", "estimate", "lower")
TRUTHS: dict[Kind, str] = {"proved": "exact norm of the Jacobian", "probable": "certificate"}
AT_CENTRE = "; the ratio is over the truth at the centre, which is at most the constant here"
TITLES = ("bound", "median value", "times the truth: median", "worst", "blocks", "seconds")


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One bound over all blocks.

    Args:
        bound: its name.
        kind: of its promise.
        value: median.
        ratio: median of value over truth; None without a truth.
        worst: the ratio farthest from 1.
        count: of numbers it is about.
        seconds: median of an evaluation.
    """

    bound: str
    kind: Kind
    value: float
    ratio: float | None
    worst: float | None
    count: int
    seconds: float


@dc.dataclass(frozen=True, kw_only=True, repr=False)
class Comparison:
    """Bounds side by side; prints as a table.

    Args:
        model: its name.
        rows: all numbers.
        refused: the bounds that do not cover one of the blocks, with the reason.
    """

    model: str
    rows: tuple[Row, ...]
    refused: dict[str, str] = dc.field(default_factory=dict)

    def groups(self) -> dict[Group, list[Summary]]:
        """The bounds of each kind, scope, norm and radius, the tightest first.

        Bounds are in order of their ratios to the truth, or of their values where there is none: the smallest first
        for upper bounds, the largest first for lower ones, the nearest to 1 first for estimates.
        """
        rows: dict[Group, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
        for row in self.rows:
            if row.bound != "truth":
                rows[row.group][row.bound].append(row)
        order = sorted(rows, key=lambda g: (KIND_ORDER.index(g[0]), [*SCOPE_WORDS].index(g[1]), g[2], g[3] or 0.0))
        return {
            group: sorted((_summary(name, of) for name, of in rows[group].items()), key=lambda s: _rank(s, group[0]))
            for group in order
        }

    def truth_words(self) -> str:
        """What the ratios are taken over, in words."""
        kinds = {row.kind for row in self.rows if row.bound == "truth"}
        if not kinds:
            return "no truth was computed"
        deltas = {row.delta for row in self.rows if row.bound == "truth" and row.delta is not None}
        names = [name for kind, name in TRUTHS.items() if kind in kinds]
        chance = f" (fails with probability at most {max(deltas):g} per number)" if deltas else ""
        return f"truth at the point in l2: {' or '.join(names)}{chance}"

    # -- for people -----------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        parts = [self._head()]
        for group, summaries in self.groups().items():
            rows = [TITLES, *map(_cells, summaries)]
            widths = [max(len(row[column]) for row in rows) for column in range(len(TITLES))]
            lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
            parts.append("\n".join([_words(group), *lines]))
        parts += [f"{name}: left out at some blocks. {reason}" for name, reason in sorted(self.refused.items())]
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        parts = [f"<p>{html.escape(self._head())}</p>"]
        for group, summaries in self.groups().items():
            head = "".join(f"<th>{title}</th>" for title in TITLES)
            body = "".join(
                f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in _cells(one))}</tr>" for one in summaries
            )
            parts.append(f"<table><caption>{html.escape(_words(group))}</caption><tr>{head}</tr>{body}</table>")
        parts += [f"<p>{html.escape(f'{name}: {reason}')}</p>" for name, reason in sorted(self.refused.items())]
        return "".join(parts)

    def _head(self) -> str:
        layers = len({row.layer for row in self.rows})
        blocks = len({(row.input, row.layer, row.item) for row in self.rows})
        return f"{self.model}: {counted(layers, 'attention layer')}, {counted(blocks, 'block')}; {self.truth_words()}"

    # -- for programs ---------------------------------------------------------------------------------------------

    def records(self) -> list[dict[str, Any]]:
        """All numbers, one dictionary for each, with the ratio."""
        return [dc.asdict(row) | {"ratio": row.ratio} for row in self.rows]

    def to_pandas(self) -> Any:
        """All numbers as a pandas.DataFrame, one row for each.

        Raises:
            LipboundsError: pandas is not installed.
        """
        try:
            import pandas  # pyright: ignore[reportMissingImports]  # only where a caller asks for a frame
        except ModuleNotFoundError as error:
            raise LipboundsError("to_pandas needs pandas, which is not installed; run `pip install pandas`.") from error
        return pandas.DataFrame(self.records())

    def to_csv(self, path: str | Path | None = None) -> str:
        """All numbers as CSV, one line for each.

        Args:
            path: where to write it, too.
        """
        text = io.StringIO()
        names = [*(field.name for field in dc.fields(Row)), "ratio"]
        writer = csv.DictWriter(text, fieldnames=names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.records())
        return _written(text.getvalue(), path)

    def to_json(self, path: str | Path | None = None) -> str:
        """All numbers as JSON; non-finite ones are the strings "inf" and "-inf".

        Args:
            path: where to write it, too.
        """
        content = {"schema_version": SCHEMA_VERSION, "model": self.model, "truth": self.truth_words()}
        return _written(json_text(content | {"rows": self.records(), "refused": self.refused}), path)

    def to_latex(self, path: str | Path | None = None) -> str:
        """The ranked tables as LaTeX with booktabs, one tabular for each kind, scope, norm and radius.

        Args:
            path: where to write it, too.
        """
        parts = ["% needs \\usepackage{booktabs}", f"% {self._head()}"]
        for group, summaries in self.groups().items():
            cells = [[f"\\texttt{{{_latex(name)}}}", *map(_latex, rest)] for name, *rest in map(_cells, summaries)]
            titles = " & ".join(map(_latex, TITLES))
            body = "\n".join(" & ".join(row) + r" \\" for row in cells)
            parts.append(
                f"% {_words(group)}\n\\begin{{tabular}}{{l{'r' * (len(TITLES) - 1)}}}\n\\toprule\n{titles} \\\\\n"
                f"\\midrule\n{body}\n\\bottomrule\n\\end{{tabular}}"
            )
        return _written("\n\n".join(parts) + "\n", path)

    def plot(self, path: str | Path | None = None) -> Any:
        """A figure of all ratios to the truth, at the point and in l2, one line of dots for each bound.

        Args:
            path: where to write it, too; the suffix says how, such as .pdf or .png.

        Returns:
            The matplotlib Figure.

        Raises:
            LipboundsError: matplotlib is not installed, or there is no ratio to draw.
        """
        return plot(self.rows, self.model, path)


def _summary(name: str, rows: list[Row]) -> Summary:
    ratios = [row.ratio for row in rows if row.ratio is not None]
    return Summary(
        bound=name,
        kind=rows[0].kind,
        value=median(row.value for row in rows),
        ratio=median(ratios) if ratios else None,
        worst=max(ratios, key=lambda ratio: abs(math.log(ratio)) if ratio > 0 else math.inf) if ratios else None,
        count=len(rows),
        seconds=median(row.seconds for row in rows),
    )


def _rank(one: Summary, kind: Kind) -> tuple[float, str]:
    size = one.value if one.ratio is None else one.ratio
    if kind == "lower":
        size = -size
    elif kind == "estimate" and one.ratio is not None:
        size = abs(math.log(size)) if size > 0 else math.inf
    return size, one.bound


def _words(group: Group) -> str:
    kind, scope, norm, radius = group
    ball = f", radius {radius:g}" if radius is not None else ""
    return f"{kind}, {SCOPE_WORDS[scope]}, {norm}{ball}" + ("" if scope == "point" else AT_CENTRE)


def _cells(one: Summary) -> tuple[str, ...]:
    """Name, numbers with four digits on the side of the promise, and the time."""
    numbers = [
        "-" if number is None else shown(number, one.kind, DIGITS) for number in (one.value, one.ratio, one.worst)
    ]
    return one.bound, *numbers, str(one.count), f"{one.seconds:.2g}"


def _latex(text: str) -> str:
    return r"$\infty$" if text == "inf" else text.replace("_", r"\_").replace("%", r"\%")


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        write_atomically(Path(path), text.encode())
    return text
