"""ALBERT trained on chemical reactions, from a package on disk: 3 MB, and no network is needed."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lipbounds.models.hub import load_hub_model
from lipbounds.models.packages import check_fingerprint, package_file


INSTALL = "pip install --no-deps rxnmapper==0.4.3"
FOLDER = "models/transformers/albert_heads_8_uspto_all_1310k"
REACTION = "CC(=O)O.OCC>>CC(=O)OCC.O"
FINGERPRINT = (-0.4934216, -0.7594156, 0.6510136, -0.0562957)  # of the last token of that reaction
# One token for each atom, bond, ring or branch of a SMILES string, as Schwaller et al. 2019 cut them.
TOKEN = r"\[[^\]]+\]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>>?|\*|\$|%[0-9]{2}|[0-9]"


def load_albert_rxn() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The encoder (12 layers that share their weights, 8 heads, dimension 256, float32), and its tokenizer of SMILES.

    The pooler is taken off where the checkpoint has no weights for it. The output is checked at a fixed reaction.

    Raises:
        LipboundsError: the package is not installed, or the weights are not those that were checked.
        InvalidInput: the checkpoint is damaged.

    Source: P. Schwaller et al., Extraction of organic chemistry grammar from unsupervised learning of chemical
    reactions, Science Advances 7, 2021, as the package rxnmapper (MIT) ships it.
    """
    folder = package_file("rxnmapper", FOLDER, model="albert-rxn", install=INSTALL)
    model, tokenizer = load_hub_model(folder), reaction_tokenizer(folder / "vocab.txt")
    with torch.no_grad():
        output = model(**tokenizer(REACTION, return_tensors="pt")).last_hidden_state[0]
    check_fingerprint("albert-rxn", output, FINGERPRINT)
    return model, tokenizer


def reaction_tokenizer(vocabulary: Path) -> PreTrainedTokenizerBase:
    """A tokenizer of SMILES strings.

    Args:
        vocabulary: a file with a token per line; the first is number 0.
    """
    words = vocabulary.read_text(encoding="utf-8").splitlines()
    numbers = {word: number for number, word in enumerate(words)}
    made = Tokenizer(WordLevel(numbers, unk_token="[UNK]"))
    made.pre_tokenizer = Split(Regex(TOKEN), "isolated")
    ends = [(token, numbers[token]) for token in ("[CLS]", "[SEP]")]
    made.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="[UNK]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        mask_token="[MASK]",
    )
