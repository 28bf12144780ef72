"""Transformers of common shapes built from their configurations alone, at their random start.

No pretrained weights of these models are reachable offline. At the start attention is nearly uniform, so their numbers
say how bounds do on the shapes and masks of these models, not on what training makes of them.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.workloads.hashes import recipe_hash
from lipbounds.claims import Feature


START_SEED = 0
TOKENS = 64
VOCABULARY = 1000


@dc.dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model at its random start, and inputs for it.

    Args:
        description: one sentence for the reader of a table.
        configuration: names of configuration and model in transformers, and the arguments of the first.
        layers: number of attention blocks.
        chosen: the layers that are bounded.
        width: number of entries of a token.
        features: of all blocks.
        input: makes an input from a seed.
        seconds: expected for all evaluations at one block.
    """

    description: str
    configuration: tuple[str, str, dict[str, Any]]
    layers: int
    chosen: tuple[int, ...]
    width: int
    features: frozenset[Feature]
    input: Callable[[int], Tensor]
    seconds: float

    def model(self) -> nn.Module:
        """The model in float32 and evaluation mode, the same every time."""
        import transformers

        config, model, arguments = self.configuration
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(START_SEED)
            built = getattr(transformers, model)(getattr(transformers, config)(**arguments, attn_implementation="sdpa"))
        return built.eval()

    def model_hash(self) -> str:
        """Content hash of how its weights are drawn."""
        return recipe_hash(configuration=self.configuration, seed=START_SEED)

    def input_hash(self, seed: int) -> str:
        """Content hash of how an input is drawn.

        Args:
            seed: of the input.
        """
        return recipe_hash(input=self.input.__name__, tokens=TOKENS, vocabulary=VOCABULARY, seed=seed)


def image(seed: int) -> Tensor:
    """One image of Gaussian pixels, 224 x 224."""
    return torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(seed))


def words(seed: int) -> Tensor:
    """One text of uniformly random tokens."""
    return torch.randint(VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(seed))


ARCHITECTURES = {
    "vit-b-16": Architecture(
        description="ViT-B/16, random-init: 768 features, 12 heads, 197 tokens, on a Gaussian image; layers 1, 12",
        configuration=("ViTConfig", "ViTModel", {}),
        layers=12,
        chosen=(0, 11),
        width=768,
        features=frozenset({"heads"}),
        input=image,
        seconds=30.0,
    ),
    "deit-s": Architecture(
        description="DeiT-S, random-init: 384 features, 6 heads, 198 tokens, on a Gaussian image; layers 1, 7, 12",
        configuration=(
            "DeiTConfig",
            "DeiTModel",
            {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
        ),
        layers=12,
        chosen=(0, 6, 11),
        width=384,
        features=frozenset({"heads"}),
        input=image,
        seconds=15.0,
    ),
    "gpt-2": Architecture(
        description="GPT-2, random-init: causal, 768 features, 12 heads, on 64 random tokens; layers 1, 7, 12",
        configuration=("GPT2Config", "GPT2Model", {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}),
        layers=12,
        chosen=(0, 6, 11),
        width=768,
        features=frozenset({"heads", "mask"}),
        input=words,
        seconds=10.0,
    ),
    "llama-like": Architecture(
        description="Llama-like, random-init: causal, rotary positions, RMSNorm, 768 features, 12 query and 4 key "
        "heads, on 64 random tokens; layers 1, 7, 12",
        configuration=(
            "LlamaConfig",
            "LlamaModel",
            {
                "vocab_size": VOCABULARY,
                "hidden_size": 768,
                "intermediate_size": 2048,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "num_key_value_heads": 4,
            },
        ),
        layers=12,
        chosen=(0, 6, 11),
        width=768,
        features=frozenset({"heads", "mask", "rotary"}),
        input=words,
        seconds=10.0,
    ),
}
