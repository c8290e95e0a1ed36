"""The models that benchmarks run: the embedded one, and random weights in the shape of a released one."""

from __future__ import annotations

import base64
import itertools
import json
from importlib.resources import files
from pathlib import Path

LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "dtype": "bfloat16",
}
NUM_RANKS = 128_000


def model_folder(name: str, scratch: Path) -> tuple[Path, list[str]]:
    """name: "cria", "dummy-1b", or a folder. -> (the folder to serve, the flags that it needs)."""
    if name == "cria":
        return Path(str(files("pronk.engine") / "cria")), []
    if name == "dummy-1b":
        return write_dummy(scratch / "dummy-1b"), ["--load-format", "dummy"]
    return Path(name), []


def write_dummy(folder: Path) -> Path:
    """A folder with the 1B's config and a vocabulary of its size: all bytes, then pairs and triples of bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA_3_2_1B))
    pieces = itertools.chain.from_iterable(itertools.product(range(256), repeat=length) for length in (1, 2, 3))
    lines = (
        f"{base64.b64encode(bytes(piece)).decode()} {rank}\n"
        for rank, piece in enumerate(itertools.islice(pieces, NUM_RANKS))
    )
    (folder / "tokenizer.model").write_text("".join(lines))
    return folder
