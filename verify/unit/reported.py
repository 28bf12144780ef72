"""A small model, and a report on it with names that strangers chose, for the tests of the report."""

from __future__ import annotations

import functools
from html.parser import HTMLParser

import torch
from torch import nn

from lipbounds.report import ModelInput, ModelReport, measure


HOSTILE = "</script><img src=x onerror=\"document.title='hacked'\"><!-- ' & {{data}}"
LABELS = (HOSTILE, "[CLS]", "the", "\u202emovie", "\u2028", "\ud800")  # right to left; a line; half a letter


def tiny_model() -> nn.Module:
    """Two layers of three heads with biases on tokens of twelve features."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.TransformerEncoderLayer(12, 3, 16, dropout=0.0, batch_first=True) for _ in range(2)]
        for layer in layers:
            nn.init.normal_(layer.self_attn.in_proj_bias)
    return nn.Sequential(*layers).eval()


def tiny_input(items: int = 1) -> torch.Tensor:
    """Six tokens."""
    return 2 * torch.randn(items, 6, 12, generator=torch.Generator().manual_seed(1))


@functools.cache
def tiny_report() -> ModelReport:
    """Two inputs; the first has the hostile names."""
    first = ModelInput(name=HOSTILE, args=(tiny_input(),), labels=LABELS)
    second = ModelInput(name="half of it", args=(tiny_input() / 2,))
    return measure(tiny_model(), [first, second], name=HOSTILE, radii=[0.5])


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the text of the last of each."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found:
            tag, attributes = self.found[-1]
            self.texts.setdefault(attributes.get("id") or tag, data)
