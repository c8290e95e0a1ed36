"""Tiny Llama checkpoints on disk, for every test that needs a model.

`tiny_llama` gives the `config.json` of a model shaped like the 1B, the 3B or the 8B; `write_checkpoint` fills a folder
with random weights of that shape, in Hugging Face's layout or in Meta's. Transformers draws and saves the weights, so
what is read back was not written by the code under test.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from torch import Tensor

if not torch.cuda.is_available():
    # Triton reads this when it is first imported, which for a test of the engine transformers may do: see
    # tests/kernels/gpu/conftest.py.
    os.environ.setdefault("TRITON_INTERPRET", "1")

TinyLlama = Callable[..., dict[str, Any]]
WriteCheckpoint = Callable[..., Path]

BYTE_RANKS = 256
SPECIAL_TOKENS = 256

COMMON = {
    "vocab_size": BYTE_RANKS + SPECIAL_TOKENS,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "initializer_range": 0.1,
    "bos_token_id": BYTE_RANKS,
    "eos_token_id": [BYTE_RANKS + 1, BYTE_RANKS + 8, BYTE_RANKS + 9],
}
SHAPES: dict[str, dict[str, Any]] = {
    # heads of 64, four query heads to a key/value head, tied
    "1b": {
        "hidden_size": 512,
        "intermediate_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_factor": 32.0,
    },
    # heads of 128, three query heads to a key/value head, tied
    "3b": {
        "hidden_size": 768,
        "intermediate_size": 512,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "tie_word_embeddings": True,
        "rope_factor": 32.0,
    },
    # heads of 128, four query heads to a key/value head, a head of its own
    "8b": {
        "hidden_size": 512,
        "intermediate_size": 768,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "rope_factor": 8.0,
    },
}


@pytest.fixture(scope="session")
def tiny_llama() -> TinyLlama:
    """`tiny_llama("1b" | "3b" | "8b", **changes)`: the keys of a `config.json`, as the released models spell them.

    `rope_factor=8.0` or `32.0` sets Llama 3's scaling, `rope_factor=None` leaves it out; any other keyword is a key
    of `config.json`. The vocabulary is the 256 bytes followed by Llama 3's 256 special tokens.
    """

    def tiny(like: str = "1b", **changes: Any) -> dict[str, Any]:
        config = {**COMMON, **SHAPES[like], **changes}
        factor = config.pop("rope_factor")
        config.setdefault("rope_scaling", None if factor is None else llama3_scaling(factor))
        return config

    return tiny


@pytest.fixture(scope="session")
def write_checkpoint() -> WriteCheckpoint:
    """`write_checkpoint(folder, config, *, layout="hf" | "meta", shards=1, seed=0, dtype="bfloat16") -> folder`.

    `config` is what `tiny_llama` gives. The same config and seed give the same model in both layouts and in any number
    of shards. Meta's layout has no key for the size of a head: there `hidden_size` must be heads times `head_dim`.
    A `tokenizer.model` of the 256 bytes is always written.
    """

    def write(
        folder: Path,
        config: Mapping[str, Any],
        *,
        layout: str = "hf",
        shards: int = 1,
        seed: int = 0,
        dtype: str = "bfloat16",
    ) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        model = random_model(config, seed=seed, dtype=dtype)
        if layout == "hf":
            write_huggingface(folder, model, shards)
        elif layout == "meta":
            write_meta(folder, model, config, shards)
        else:
            raise ValueError(f"layout is {layout!r}: it can be 'hf' or 'meta'")
        write_byte_tokenizer(folder / "tokenizer.model")
        return folder

    return write


def llama3_scaling(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def random_model(config: Mapping[str, Any], *, seed: int, dtype: str) -> Any:
    """A `LlamaForCausalLM` whose every tensor is random: norms too, so that a norm left out or mixed up is seen."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**config))
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
        return model.to(getattr(torch, dtype)).eval()


def write_byte_tokenizer(path: Path) -> None:
    """A rank file in which every byte is a token and nothing merges."""
    path.write_text("".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(BYTE_RANKS)))


def write_huggingface(folder: Path, model: Any, shards: int) -> None:
    """What `save_pretrained` writes; for several shards, its one file dealt out tensor by tensor, with an index."""
    from safetensors.torch import load_file, save_file

    model.save_pretrained(folder)
    if shards == 1:
        return
    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    names = [f"model-{number + 1:05d}-of-{shards:05d}.safetensors" for number in range(shards)]
    weight_map = {tensor: names[position % shards] for position, tensor in enumerate(tensors)}
    for name in names:
        save_file({tensor: tensors[tensor] for tensor, file in weight_map.items() if file == name}, folder / name)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    whole.unlink()


def write_meta(folder: Path, model: Any, config: Mapping[str, Any], shards: int) -> None:
    """`params.json` and `consolidated.NN.pth`, by the layout's rules alone: names, row order, cut of the shards."""
    import torch

    tensors = meta_tensors(model, config)
    for shard in range(shards):
        part = {name: shard_of(name, tensor, shard, shards) for name, tensor in tensors.items()}
        torch.save(part, folder / f"consolidated.{shard:02d}.pth")
    (folder / "params.json").write_text(json.dumps(meta_params(config)))


def meta_params(config: Mapping[str, Any]) -> dict[str, Any]:
    scaling = config["rope_scaling"]
    params = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "vocab_size": config["vocab_size"],
        "hidden_dim": config["intermediate_size"],
        "multiple_of": 256,
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": config["rope_theta"],
        "use_scaled_rope": scaling is not None,
    }
    if scaling is not None:
        params["rope_scale_factor"] = scaling["factor"]
    return params


def meta_tensors(model: Any, config: Mapping[str, Any]) -> dict[str, Tensor]:
    layer_names = {
        "attention_norm": "input_layernorm",
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
    }
    state = model.state_dict()
    tensors = {"tok_embeddings.weight": state["model.embed_tokens.weight"], "norm.weight": state["model.norm.weight"]}
    if not config["tie_word_embeddings"]:
        tensors["output.weight"] = state["lm_head.weight"]
    for layer in range(config["num_hidden_layers"]):
        for meta, huggingface in layer_names.items():
            tensor = state[f"model.layers.{layer}.{huggingface}.weight"]
            if meta in ("attention.wq", "attention.wk"):
                tensor = interleave(tensor, config["head_dim"])
            tensors[f"layers.{layer}.{meta}.weight"] = tensor
    return tensors


def interleave(weight: Tensor, head_dim: int) -> Tensor:
    """Hugging Face's row order of Q and K to Meta's, row by row.

    In each head, Meta's row 2j is Hugging Face's row j, and Meta's row 2j + 1 is Hugging Face's row j + head_dim / 2.
    """
    half = head_dim // 2
    rows = [head + j + side * half for head in range(0, len(weight), head_dim) for j in range(half) for side in (0, 1)]
    return weight[rows]


def shard_of(name: str, tensor: Tensor, shard: int, shards: int) -> Tensor:
    """Meta's cut: wo and w2 by columns, norms copied, everything else by rows."""
    if "norm" in name:
        return tensor.clone()
    columns = name.endswith(("wo.weight", "w2.weight"))
    return tensor.chunk(shards, dim=1 if columns else 0)[shard].clone()
