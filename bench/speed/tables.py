"""Page and figure of the task `speed`, from its data alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl


mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.artist import Artist

from bench.pages.colours import BOLD, THE_PAPER, family_colour
from bench.pages.figure_files import arrange, save
from bench.pages.formatting import figure, table
from bench.pages.log_axes import log_scale
from bench.pages.page import folded, page
from bench.speed import pareto_tables
from bench.speed.timing import exponent
from lipbounds.number_format import counted


Data = dict[str, Any]
AXES = {"tokens": "n", "width": "D", "heads": "H", "batch": "batch"}
DRAWN: dict[str, dict[str, Any]] = {  # markers; the scope of a ball is dashed
    "yudin2025.biased": {"marker": "o", "linewidth": 2.6},
    "sharp": {"marker": "P", "linewidth": 2.6},
    "sharp_fast": {"marker": "D"},
    "centred.products": {"marker": "s"},
    "covariance.exact": {"marker": "^"},
    "yudin2025_ball.biased": {"marker": "v", "linestyle": "--"},
    "lanczos_certificate": {"marker": "x", "color": "black", "linestyle": ":"},
    "exact": {"marker": "+"},
}


def report(data: Data, command: str, environment: str) -> str:
    """The page of results.

    Args:
        data: what `bench.speed.task.run` returned.
        command: that made it.
        environment: of this run, in a line.
    """
    here = data["place"]
    targets = _targets(data["targets"]) if data["targets"] else []
    how = (
        f"Measured on {here['hardware']} with "
        f"{counted(here['threads'], 'thread')}. A cost is "
        + (
            "processor time, which counts nothing while other programs run"
            if here["device"] == "cpu"
            else "time between events on the card"
        )
        + "; a ratio is the cost of a bound over that of one forward pass of the same block in its own dtype. The two "
        "are measured in turns in the same process; given are the median and, in brackets, the quartiles. Bounds are "
        "evaluated in float64 whatever the dtype of the block. Norms of weights are kept from one input to the next "
        "(`keep_weight_norms`) unless said otherwise. Memory is the highest point of a call above where it began ("
        + ("resident set of the process, by Linux" if here["device"] == "cpu" else "allocated by torch on the device")
        + "); below one or two MB it is noise. Blocks are random: n tokens, width D, H heads of width D/H."
    )
    parts = [
        "# Speed",
        "![Cost in forward passes, seconds and memory over the number of tokens](speed.png)",
        *targets,
        *pareto_tables.section(data.get("pareto", [])),
        how,
        f"Made by `{command}`; nothing here is written by hand.",
        "## Growth",
        *_growth(data),
        "## Long maps",
        *_streamed(data["streamed"]),
        "## Not measured further",
        *_stopped(data),
        *("## Environment", f"- {environment}"),
    ]
    return page(parts)


def _ratio(answer: Data) -> str:
    if "error" in answer:
        return answer["error"]
    low, median, high = answer["ratio"]
    many = "" if answer["repeats"] == 1 else f" [{figure(low)}, {figure(high)}]"
    return f"{figure(median)}{many}"


def _targets(targets: list[Data]) -> list[str]:
    caption = (
        "n = 197, D = 768, 12 heads, float32, with biases: all 12 layers of the encoder have this shape, so the ratio "
        "of one is that of all. A training step is forward, backward and SGD on one image."
    )
    rows = target_rows(targets)
    aims = [row for row in rows if row[4] != "-"]
    missed = [f"{row[1]} ({row[3].split(' ')[0]}, target {row[2]})" for row in aims if row[4] == "missed"]
    met = len(aims) - len(missed)
    told = f"Of {len(aims)} targets for a block of ViT-B/16, {met} {'is' if met == 1 else 'are'} met."
    told += f" Missed: {', '.join(missed)}." if missed else ""
    return [told, caption, table(["what", "name", "target", "ratio", "met", "seconds"], rows)]


def target_rows(targets: list[Data]) -> list[list[str]]:
    """For each target: what it is about, the name, the limit, the ratio, whether it is met, and seconds.

    Args:
        targets: with `title`, `method`, `limit` and the `answer` of a measurement.
    """
    rows = []
    for target in targets:
        answer, limit = target["answer"], target["limit"]
        met = "-" if limit is None or "error" in answer else "yes" if answer["ratio"][1] <= limit else "missed"
        cost = figure(answer["cost"][1]) if "cost" in answer else "-"
        wanted = "-" if limit is None else f"<= {limit:g}"
        rows.append([target["title"], f"`{target['method']}`", wanted, _ratio(answer), met, cost])
    return rows


def _points(data: Data, method: str, axis: str, key: str) -> list[tuple[Any, float]]:
    """Values of an axis, and medians or numbers at them."""
    found = []
    for row in data["rows"]:
        if row["method"] == method and row["axis"] == axis and row["answer"].get(key) is not None:
            value = row["answer"][key]
            found.append((row["value"], value[1] if isinstance(value, list) else value))
    return found


def methods(data: Data) -> list[str]:
    """The methods in the order in which they were measured.

    Args:
        data: what `bench.speed.task.run` returned.
    """
    return list(dict.fromkeys(row["method"] for row in data["rows"]))


def _growth(data: Data) -> list[str]:
    rows = []
    for method in methods(data):
        ratios = _points(data, method, "tokens", "ratio")
        if not ratios:
            continue
        memory = _points(data, method, "tokens", "megabytes")
        line = [f"`{method}`", figure(ratios[0][1]), f"{figure(ratios[-1][1])} at {ratios[-1][0]}"]
        line.append(f"{figure(max(0.0, memory[-1][1]))} at {memory[-1][0]}" if memory else "-")
        line += [_exponent(_points(data, method, axis, "cost")) for axis in AXES]
        costs = dict(_points(data, method, "dtype", "cost"))
        base = costs.get("float32")
        line += [figure(costs[name] / base) if base and name in costs else "-" for name in ("float64", "bfloat16")]
        rows.append(line)
    caption = (
        "Ratio at n = 64 (D = 64, 2 heads) and at the largest n that was measured, memory there in MB, and the growth "
        "exponents of the cost: the slope of the logarithm of the cost over at most the last four sizes, and in "
        "brackets the smallest and the largest slope between neighbouring sizes. A dash: fewer than three sizes were "
        "measured. On small blocks the cost is mostly that of Python, so exponents are small there. The last columns "
        "are the cost for a block of that dtype over the cost for float32."
    )
    titles = ["method", "ratio at n = 64", "ratio at largest n", "MB", *(f"in {name}" for name in AXES.values())]
    return [caption, folded("All methods", table([*titles, "float64", "bfloat16"], rows))]


def _exponent(points: list[tuple[Any, float]]) -> str:
    fitted = exponent(points)
    if fitted is None:
        return "-"
    low, high = fitted["between"]
    return f"{fitted['slope']:.1f} [{low:.1f}, {high:.1f}] to {fitted['sizes'][1]}"


def _streamed(streamed: list[Data]) -> list[str]:
    rows = []
    for row in streamed:
        answer = row["answer"]
        memory = answer.get("megabytes")
        cost = figure(answer["cost"][1]) if "cost" in answer else "-"
        rows.append([row["tokens"], row["method"], _ratio(answer), cost, "-" if memory is None else figure(memory)])
    caption = (
        "One head of width 64, float32 queries and keys, evaluated in float64; the ratio is to "
        "`scaled_dot_product_attention` with the same queries and keys."
    )
    return [caption, table(["n", "what", "ratio", "seconds", "MB"], rows)]


def _stopped(data: Data) -> list[str]:
    if not data["stopped"]:
        return ["Everything was measured at every size."]
    found: dict[str, list[str]] = {}
    for row in data["stopped"]:
        answer = row["answer"]
        why = answer.get("error") or f"{figure(answer['cost'][1])} s"
        found.setdefault(row["method"], []).append(f"{AXES.get(row['axis'], row['axis'])} = {row['value']} ({why})")
    caption = (
        f"A method that took more than {data['limit']:g} s ({data['patience']:g} s for some, against n) is not "
        "measured at the next size of that axis. Where each stopped:"
    )
    rows = [[f"`{name}`", "; ".join(places)] for name, places in found.items()]
    return [caption, folded("Last sizes by method", table(["method", "last sizes"], rows))]


def draw(data: Data, folder: Path) -> list[Path]:
    """Ratio to a forward pass, and memory, against the number of tokens, as PNG and SVG.

    Args:
        data: what `bench.speed.task.run` returned.
        folder: where the files go.
    """
    panels = (("ratio", "cost, in forward passes"), ("cost", "seconds"), ("megabytes", "peak memory, MB"))
    with mpl.rc_context({"svg.hashsalt": "speed", "svg.fonttype": "none", "font.size": 10}):
        canvas, all_axes = plt.subplots(1, len(panels), figsize=(14, 4.4), dpi=150)
        handles: dict[str, Artist] = {}  # of all panels: not every method has its memory measured
        for axes, (key, title) in zip(all_axes, panels, strict=True):
            for method, look in DRAWN.items():
                points = [(size, value) for size, value in _points(data, method, "tokens", key) if value > 0]
                if points:
                    looks: dict[str, Any] = {"color": family_colour(method), "linewidth": 1.4, "markersize": 5} | look
                    (handles[method],) = axes.plot(*zip(*points, strict=True), label=method, **looks)
            log_scale(axes.xaxis, base=2)
            log_scale(axes.yaxis)
            axes.set_xlabel("tokens n (D = 64, 2 heads)")
            axes.set_title(title, loc="left", fontsize=10)
            axes.grid(color="#dddddd", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        all_axes[0].axhline(1.0, color="#888888", linewidth=0.8, linestyle="--")
        listed = [name for name in DRAWN if name in handles]
        legend = all_axes[-1].legend(
            [handles[name] for name in listed],
            [f"{name} (the paper)" if name == THE_PAPER else name for name in listed],
            **{"loc": "center left", "bbox_to_anchor": (1.02, 0.5), "fontsize": 9, "frameon": False},
            labelcolor="#222222",
        )
        for words in legend.get_texts():
            words.set_fontweight("bold" if words.get_text().split(" ")[0] in BOLD else "normal")
        arrange(canvas)
        paths = save(canvas, folder, "speed")
        plt.close(canvas)
    return [*paths, *pareto_tables.draw(data.get("pareto", []), folder)]
