"""A checkpoint of random weights in the shape of Llama 3.2 1B that every server can load.

    python bench/checkpoint.py FOLDER

Writes config.json, model.safetensors (2.5 GB, bfloat16), tokenizer.model and tokenizer.json. The vocabulary is made up:
the 256 bytes, then pairs and triples of printable characters. The embeddings of tokens that show no text of their own
(special ones, and bytes that are part of a character) are near zero, so that a greedy answer has none of them, and each
token of it comes as text, for servers that send no text otherwise.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from models import LLAMA_3_2_1B, NUM_RANKS
from safetensors.torch import save_file
from torch import Tensor

from pronk.engine.tokenizer import SPLIT_PATTERN, llama_special_tokens

PRINTABLE = range(32, 127)
FIRST_SHOWN = 256
"""The first id of those that greedy answers are made of, up to NUM_RANKS."""


def vocabulary() -> list[bytes]:
    """The pieces by rank. Each longer one is the merge of all but its last byte with that."""
    pieces = [bytes([byte]) for byte in range(256)]
    for length in (2, 3):
        pieces += map(bytes, itertools.product(PRINTABLE, repeat=length))
    return pieces[:NUM_RANKS]


def spelled(piece: bytes) -> str:
    """As tokenizer.json spells bytes: printable characters are themselves, others come after U+0100."""
    return "".join(_SPELLING[byte] for byte in piece)


def _spelling() -> list[str]:
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = itertools.count(256)
    return [chr(byte if byte in shown else next(hidden)) for byte in range(256)]


_SPELLING = _spelling()


def write_tokenizers(folder: Path) -> None:
    pieces = vocabulary()
    lines = (f"{base64.b64encode(piece).decode()} {rank}\n" for rank, piece in enumerate(pieces))
    (folder / "tokenizer.model").write_text("".join(lines))
    special = [
        {"id": number, "content": name, "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for name, number in llama_special_tokens(NUM_RANKS).items()
    ]
    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    document: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytewise]},
        "post_processor": None,
        "decoder": bytewise,
        "model": {
            "type": "BPE",
            "vocab": {spelled(piece): rank for rank, piece in enumerate(pieces)},
            "merges": [[spelled(piece[:-1]), spelled(piece[-1:])] for piece in pieces if len(piece) > 1],
            "ignore_merges": True,
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 131072}
    settings |= {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def random_weights() -> dict[str, Tensor]:
    """As the checkpoints of transformers name them; the head is the embedding."""
    config: dict[str, Any] = LLAMA_3_2_1B
    hidden, width, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    attended, kept = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(0.02).to(torch.bfloat16)

    def ones() -> Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16)

    embedding = normal(config["vocab_size"], hidden)
    embedding[:FIRST_SHOWN] *= 0.01
    embedding[NUM_RANKS:] *= 0.01
    weights = {"model.embed_tokens.weight": embedding, "model.norm.weight": ones()}
    shapes = {"self_attn.q_proj": (attended, hidden), "self_attn.o_proj": (hidden, attended)}
    shapes |= dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (kept, hidden))
    shapes |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (width, hidden)) | {"mlp.down_proj": (hidden, width)}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in shapes.items():
            weights[f"model.layers.{layer}.{name}.weight"] = normal(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = ones()
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA_3_2_1B))
    write_tokenizers(folder)
    save_file(random_weights(), folder / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main()
