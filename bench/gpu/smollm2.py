"""SmolLM2-135M on one sentence, every one of its 30 blocks: as trained where it is installed, or at a random start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from bench.workloads.architectures import VOCABULARY, words
from lipbounds.capture import capture
from lipbounds.errors import LipboundsError
from lipbounds.targets.attention import Attention


def trained() -> Iterator[Attention]:
    """The blocks of the pretrained model at a sentence.

    Raises:
        ImportError: it is not installed.
    """
    from lipbounds.models.smollm2 import SENTENCE, load_smollm2  # transformers takes seconds to import

    try:
        model, tokenizer = load_smollm2()
    except LipboundsError as error:
        raise ImportError(str(error)) from error
    for found in capture(model, **tokenizer(SENTENCE, return_tensors="pt")):
        yield found.attention


def at_random(*, layers: int, width: int) -> Iterator[Attention]:
    """The blocks of a model of its shape that is not trained, on 64 random tokens.

    Args:
        layers: 30 in SmolLM2-135M.
        width: 576 there, nine heads, three of keys and values.
    """
    from transformers import LlamaConfig, LlamaModel

    arguments: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 8 * width // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "attn_implementation": "sdpa",
    }
    config = LlamaConfig(**arguments)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaModel(config).eval()
    for found in capture(model, words(0)):
        yield found.attention
