"""Small Hugging Face models at random weights, one for each architecture that capture was tried on."""

from __future__ import annotations

import dataclasses as dc
from typing import Any

import torch
import transformers
from torch import Tensor, nn


@dc.dataclass(frozen=True, kw_only=True)
class Hub:
    """One architecture.

    Args:
        config: arguments of its configuration; two layers, or two of each kind.
        about: what is special about its attention, in a few words.
        blocks: the number of its attention blocks.
        crossed: those of them that are cross-attention.
        given: the inputs: "text", "image", "sound", "texts" (for encoder and decoder), "speech" (sound and text).
        refused: why no block of it is an `Attention`, as a pattern that the error matches; empty if all are captured.
        sdpa: transformers has it with `scaled_dot_product_attention`.
        eager: written out it is captured too.
    """

    config: dict[str, Any]
    about: str
    blocks: int = 2
    crossed: tuple[int, ...] = ()
    given: str = "text"
    refused: str = ""
    sdpa: bool = True
    eager: bool = True

    @property
    def captured(self) -> list[str]:
        """The ways to compute attention, by their names in transformers, in which all its blocks are captured."""
        return [] if self.refused else ["sdpa"] * self.sdpa + ["eager"] * self.eager


IDS = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = WIDTHS | IDS | {"max_position_embeddings": 24}
GROUPED = TEXT | {"num_key_value_heads": 2}
IMAGE = WIDTHS | {"image_size": 16, "patch_size": 4}
GPT = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "n_embd": 32, "n_layer": 2, "n_head": 4}
PAIR = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
}
XLM = {"n_words": 50, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 24}
WINDOWS = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4}

HUB = {
    # images
    "ViT": Hub(config=IMAGE, given="image", about="biases"),
    "DeiT": Hub(config=IMAGE, given="image", about="biases"),
    "Dinov2": Hub(
        config={name: IMAGE[name] for name in IMAGE if name != "intermediate_size"}, given="image", about="biases"
    ),
    "DINOv3ViT": Hub(config=IMAGE, given="image", about="rotary on the patches, not on the class token"),
    "Beit": Hub(
        config=IMAGE | {"use_relative_position_bias": True}, given="image", about="relative position bias, no key bias"
    ),
    "Swin": Hub(config=WINDOWS, blocks=3, given="image", about="windows are batch items; relative position bias"),
    "CLIPVision": Hub(config=IMAGE, given="image", about="biases"),
    "SiglipVision": Hub(config=IMAGE, blocks=3, crossed=(2,), given="image", about="a pooling head too"),
    "Swinv2": Hub(
        config=WINDOWS, given="image", about="cosine attention", refused="torch.nn.functional.normalize", sdpa=False
    ),
    # text, both ways
    "Bert": Hub(config=TEXT, about="biases"),
    "Roberta": Hub(config=TEXT, about="biases"),
    "DistilBert": Hub(config=IDS | {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}, about="biases"),
    "Albert": Hub(config=TEXT | {"embedding_size": 32}, about="biases, the same weights in all layers"),
    "Electra": Hub(config=TEXT | {"embedding_size": 32}, about="biases"),
    "ModernBert": Hub(
        config=TEXT | {"global_attn_every_n_layers": 2, "local_attention": 4, "cls_token_id": 1, "sep_token_id": 2},
        about="fused, rotary, every other layer local",
    ),
    "Esm": Hub(config=TEXT | {"position_embedding_type": "rotary", "mask_token_id": 3}, about="rotary, scaled queries"),
    "CLIPText": Hub(config=TEXT, about="causal"),
    "DebertaV2": Hub(
        config=TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        about="position scores computed from the tokens",
        refused="mask must not depend on the tokens",
        sdpa=False,
    ),
    # text, causal
    "GPT2": Hub(config=GPT, about="fused Conv1D"),
    "GPTNeo": Hub(
        config=TEXT
        | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4},
        about="no scale, every other layer local",
        sdpa=False,
    ),
    "GPTJ": Hub(config=GPT | {"rotary_dim": 4}, about="rotary on half, neighbours paired", sdpa=False),
    "GPTNeoX": Hub(config=TEXT | {"rotary_pct": 0.5}, about="fused head by head, rotary on half"),
    "OPT": Hub(config=TEXT | {"ffn_dim": 48, "word_embed_proj_dim": 32}, about="biases, scaled queries"),
    "Llama": Hub(config=GROUPED, about="rotary, grouped queries"),
    "Mistral": Hub(config=GROUPED | {"sliding_window": 3}, about="rotary, grouped queries, sliding window"),
    "Qwen2": Hub(config=GROUPED, about="rotary, grouped queries, biases"),
    "Phi": Hub(config=GROUPED | {"partial_rotary_factor": 0.5}, about="rotary on half, grouped queries"),
    "Phi3": Hub(config=GROUPED, about="fused, rotary, grouped queries"),
    "Gemma": Hub(config=GROUPED | {"head_dim": 6}, about="rotary, grouped queries, heads of another width"),
    "Cohere": Hub(config=GROUPED, about="rotary with neighbours paired, grouped queries"),
    "StableLm": Hub(config=GROUPED, about="rotary on a quarter, grouped queries"),
    "Glm": Hub(config=GROUPED | {"head_dim": 8}, about="rotary on half, neighbours paired"),
    "Falcon": Hub(config=TEXT, about="fused, one key-value head, rotary"),
    "Qwen3": Hub(config=GROUPED | {"head_dim": 8}, about="QK-norm of each head, rotary, grouped queries"),
    "Olmo2": Hub(config=GROUPED, about="QK-norm of all heads together, rotary, grouped queries"),
    "Gemma3Text": Hub(
        config=GROUPED | {"head_dim": 8, "num_hidden_layers": 6, "sliding_window": 3},
        blocks=6,
        about="QK-norm of each head, rotary, grouped queries, most layers local",
    ),
    "Gemma2": Hub(config=GROUPED | {"head_dim": 8}, about="capped logits", refused="got torch.tanh", sdpa=False),
    "Bloom": Hub(
        config=IDS | {"hidden_size": 32, "n_layer": 2, "n_head": 4},
        about="positions added inside baddbmm",
        sdpa=False,
    ),
    "XLM": Hub(config=XLM, about="logits masked in place", sdpa=False),
    "MPNet": Hub(config=TEXT, about="relative position bias, added in place", sdpa=False),
    "OpenAIGPT": Hub(config=GPT, about="logits times the mask", sdpa=False),
    # encoder and decoder: two blocks an encoder layer and, in a decoder layer, one on itself and one on the encoder
    "T5": Hub(
        config=IDS | {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4},
        blocks=6,
        crossed=(3, 5),
        given="texts",
        about="relative position bias, no scale; cross-attention in the decoder",
    ),
    "Bart": Hub(
        config=PAIR | IDS | {"max_position_embeddings": 24},
        blocks=6,
        crossed=(3, 5),
        given="texts",
        about="biases; cross-attention in the decoder",
    ),
    "Whisper": Hub(
        config=PAIR
        | IDS
        | {
            **{"num_mel_bins": 8, "max_source_positions": 6, "max_target_positions": 24},
            **{"decoder_start_token_id": 1},
        },
        blocks=6,
        crossed=(3, 5),
        given="speech",
        about="no key bias; cross-attention in the decoder",
    ),
    # sound
    "Wav2Vec2": Hub(
        config=WIDTHS
        | {
            **{"vocab_size": 50, "conv_dim": [8, 8], "conv_kernel": [4, 4], "conv_stride": [4, 4]},
            **{"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
        },
        given="sound",
        about="biases",
    ),
}


def hub_model(name: str, implementation: str = "sdpa") -> nn.Module:
    """In float64 if that is the default; all parameters are random, also those that start at zero."""
    config = getattr(transformers, f"{name}Config")(**HUB[name].config, attn_implementation=implementation)
    model = getattr(transformers, f"{name}Model")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            start = parameter if parameter.dim() == 1 else 0.0
            parameter.copy_(start + 0.3 * torch.randn_like(parameter))
    return model


def hub_inputs(name: str, padded: bool = False, left: bool = False) -> dict[str, Tensor]:
    """A batch of two; the second text is padded at its end if asked, or at its start."""
    ids = torch.randint(3, 50, (2, 7))
    image, sound, speech = torch.randn(2, 3, 16, 16), torch.randn(2, 160), torch.randn(2, 8, 12)
    mask = {"attention_mask": (torch.arange(7) < torch.tensor([[7], [5]])).long()} if padded else {}
    mask = {"attention_mask": mask["attention_mask"].flip(-1)} if left else mask
    return {
        "text": {"input_ids": ids, **mask},
        "image": {"pixel_values": image},
        "sound": {"input_values": sound},
        "texts": {"input_ids": ids, "decoder_input_ids": ids[:, :5], **mask},
        "speech": {"input_features": speech, "decoder_input_ids": ids[:, :5]},
    }[HUB[name].given]


def table() -> str:
    """The table of docs/capture.md."""
    lines = ["| `transformers` | attention | `sdpa` | `eager` |", "|---|---|---|---|"]
    for name, hub in HUB.items():
        cells = ["captured" if way in hub.captured else "refused" for way in ("sdpa", "eager")]
        lines.append(f"| `{name}Model` | {hub.about} | {cells[0] if hub.sdpa else '-'} | {cells[1]} |")
    return "\n".join(lines)
