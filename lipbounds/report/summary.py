"""The sentence at the top of a report, and what is most fragile."""

from __future__ import annotations

from lipbounds.report.schema import InputReport, LayerReport, Number, least_at_point


MOST = 6


def summary(run: InputReport) -> str:
    """Which layer is the most fragile at this input, and what is known about it.

    Args:
        run: at one input.
    """
    return _left_out(run) + _most_fragile(run)


def _left_out(run: InputReport) -> str:
    """What the sentence after it is not about."""
    if not run.skipped:
        return ""
    names = [f"layer {one.layer} in {one.module or 'the model itself'}" for one in run.skipped]
    shown = ", ".join(names[:MOST]) + (f" and {len(names) - MOST} more" if len(names) > MOST else "")
    what = (
        "1 attention layer could not be captured and is"
        if len(names) == 1
        else (f"{len(names)} attention layers could not be captured and are")
    )
    return f"{what} left out: {shown}. "


def _most_fragile(run: InputReport) -> str:
    known = [layer for layer in run.layers if _size(layer) is not None]
    position = fragile_layer(run)
    if position is None:
        return "No number was computed before the time was up."
    worst = run.layers[position]
    bound = least_at_point(worst)
    proved = "" if bound is None else f"; proved bound {bound.shown} ({bound.method})"
    if worst.constant is None:
        return f"At this input, layer {worst.layer} has the largest bound{proved.removeprefix(';')}."
    return (
        f"At this input, layer {worst.layer} is the most fragile: a small move of its input can move the output of its "
        f"attention up to {worst.constant.shown} times as far ({_certainty(worst.constant, len(known))}){proved}."
    )


def _certainty(constant: Number, layers: int) -> str:
    if constant.kind != "probable" or constant.delta is None:
        return "exact up to rounding, proved"
    # The layer was chosen after looking at all of them, so the chances of all of them to fail add up.
    which = f"any of the {layers} layers" if layers > 1 else "the layer"
    return f"probable: the chance that it fails for {which} is at most {constant.delta * layers:.3g}"


def _size(layer: LayerReport) -> float | None:
    number = layer.constant or least_at_point(layer)
    return None if number is None else number.value


def fragile_layer(run: InputReport) -> int | None:
    """The place in the list of the layer with the largest constant, or bound where no constant is known.

    Args:
        run: at one input.
    """
    sizes = {position: _size(layer) for position, layer in enumerate(run.layers)}
    known = {position: size for position, size in sizes.items() if size is not None}
    return max(known, key=known.__getitem__, default=None)


def notes_of(run: InputReport) -> list[str]:
    """What could not be computed, one line for all layers to which it applies.

    Args:
        run: at one input.
    """
    grouped: dict[str, list[int]] = {}
    for layer in run.layers:
        for note in layer.notes:
            grouped.setdefault(note, []).append(layer.layer)
    return [f"{_layers(sorted(set(numbers)), len(run.layers))}: {note}." for note, numbers in grouped.items()]


def _layers(numbers: list[int], count: int) -> str:
    if len(numbers) == count > 1:
        return "All layers"
    listed = ", ".join(map(str, numbers))
    return f"Layer {listed}" if len(numbers) == 1 else f"Layers {listed}"


def fragile_heads(run: InputReport, most: int = MOST) -> list[tuple[int, int]]:
    """The heads with the largest constants, largest first: the place of the layer in the list, and the head.

    Args:
        run: at one input.
        most: how many.
    """
    sizes = [
        (-head.constant.value, position, head.head)
        for position, layer in enumerate(run.layers)
        for head in layer.heads
        if head.constant is not None
    ]
    return [(position, head) for _, position, head in sorted(sizes)[:most]]


def fragile_tokens(layer: LayerReport, most: int = MOST) -> list[int]:
    """The tokens that move the output most when they move alone, as far as the lower bounds show, largest first.

    Args:
        layer: at one input.
        most: how many.
    """
    order = sorted(range(len(layer.tokens)), key=lambda token: -layer.tokens[token].value)
    return order[:most]
