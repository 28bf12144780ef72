"""The numbers of one attention block, put together: of the whole, of each head alone, of each token, and on balls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lipbounds.capture import CapturedAttention
from lipbounds.derivatives.first.dense import batch_items
from lipbounds.derivatives.norms import row_g_1
from lipbounds.report.evaluation import Found, Numbers, Stage
from lipbounds.report.heads import mean_entropy, sinks
from lipbounds.report.maps import MAP_DIGITS
from lipbounds.report.patches import Grid, Picture, grid_of, labels_of
from lipbounds.report.schema import HeadReport, LayerReport, rounded
from lipbounds.targets.attention import Attention


class LayerWork:
    """The numbers of one captured call, in float64 and item by item of its batch; stages come back in any order.

    Args:
        found: the call.
        labels: one per token, where their count is right.
        picture: that the model was given, if it was one.
    """

    def __init__(self, found: CapturedAttention, labels: tuple[str, ...], picture: Picture | None = None) -> None:
        self.found = found
        self.items = batch_items(found.attention.double)
        self.sent: Any = None  # what stands for the items on a cluster, once a worker needs them
        self._labels = labels
        self._picture = picture
        self._stages: dict[str, Found] = {}
        self._notes: list[str] = []

    def take(self, stage: Stage, found: Found) -> None:
        """Keep what a stage found."""
        self._stages[stage.name] = found

    def note(self, note: str) -> None:
        """Keep a note on the layer beside those of its stages."""
        self._notes.append(note)

    @property
    def size(self) -> float:
        """How fragile it is: its largest constant or, where there is none, its smallest proved bound; 0 if unknown."""
        found = [item for stage in self._stages.values() for item in stage.items]
        constants = [item.constant.value for item in found if item.constant is not None]
        bounds = [min(number.value for number in item.proved) for item in found if item.proved]
        return max(constants or bounds, default=0.0)

    def leave_out(self, stage: Stage, reason: str) -> None:
        """Note that a stage has no numbers, and why."""
        self.take(stage, Found(notes=[f"{stage.name}: not computed, {reason}"]))

    def reports(self, order: Sequence[str]) -> list[LayerReport]:
        """What was computed; a batch item after the first has its number in the name of the module.

        Args:
            order: names of stages, in which their numbers are shown.
        """
        numbers = [Numbers() for _ in self.items]
        notes = dict.fromkeys(self._notes)
        for found in (self._stages[name] for name in order if name in self._stages):
            notes |= dict.fromkeys(found.notes)
            for mine, more in zip(numbers, found.items, strict=False):  # none, of a stage that was left out
                mine.add(more)
        pairs = enumerate(zip(self.items, numbers, strict=True))
        return [self._report(block, mine, number, [*notes]) for number, (block, mine) in pairs]

    def _report(self, block: Attention, numbers: Numbers, number: int, notes: Sequence[str]) -> LayerReport:
        module = self.found.module or "the model itself"
        return LayerReport(
            layer=self.found.index,
            module=module if number == 0 else f"{module}, item {number + 1} of the batch",
            queries=self._queries(block),
            keys=self._named(block.logits.shape[-1]),
            moving=self._named(block.moving_input.shape[-2]),
            features=tuple(sorted(block.features)),
            input_norm=float(block.moving_input.norm()),
            proved=tuple(numbers.proved),
            constant=numbers.constant,
            lower=numbers.lower,
            balls=tuple(numbers.balls),
            tokens=tuple(numbers.tokens),
            heads=_heads(block, numbers),
            notes=tuple(notes),
            grid=self._grid(block.moving_input.shape[-2]),
        )

    def _queries(self, block: Attention) -> tuple[str, ...]:
        if block.queries_at is None:
            return self._named(block.tokens)
        names = self._named(block.x.shape[-2])
        return tuple(names[token] for token in block.queries_at.tolist())

    def _grid(self, count: int) -> Grid | None:
        return None if self._picture is None else grid_of(count, self._picture)

    def _named(self, count: int) -> tuple[str, ...]:
        if len(self._labels) == count:
            return self._labels
        grid = self._grid(count)
        return tuple(str(i) for i in range(count)) if grid is None else labels_of(grid)


def _heads(block: Attention, numbers: Numbers) -> tuple[HeadReport, ...]:
    maps = block.probabilities
    g_1 = row_g_1(block).tolist()
    entropy = mean_entropy(maps).tolist()
    keys, shares = sinks(maps)
    return tuple(
        HeadReport(
            head=head,
            proved=tuple(_at(numbers.head_proved, head) or ()),
            constant=_at(numbers.head_constant, head),
            lower=_at(numbers.head_lower, head),
            g_1=tuple(float(rounded(value, "proved", MAP_DIGITS)) for value in g_1[head]),
            entropy=float(rounded(entropy[head], "estimate", MAP_DIGITS)),
            sink=keys[head],
            sink_share=float(rounded(shares[head], "estimate", MAP_DIGITS)),
            attention=None,  # `lipbounds.report.maps` knows of which heads there is room for it
        )
        for head in range(block.heads)
    )


def _at(numbers: list[Any], index: int) -> Any:
    return numbers[index] if index < len(numbers) else None
