"""How fast is it? Each function yields rows: the time of one call, what it moves or multiplies, and the best that torch
itself has for the same. Knows kernels and shapes; nothing of ceilings or tables.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import gpu_inputs
import torch
import torch.nn.functional as F
from gpu_device import Run, copies_for
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pronk.engine.model.llama import Llama
from pronk.kernels.interface import LayerCache

MOST_BYTES = 24 << 30
"""Of one row's data: what fits beside the rest on a GPU of 80 GB."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    group: str
    name: str
    seconds: float
    nbytes: float = 0.0
    """That must be read and written."""
    flops: float = 0.0
    tokens: float = 0.0
    """Made in the time."""
    torch_seconds: float | None = None
    """The best of torch's own."""


def best_of_torch(device: Any, calls: list[Run]) -> float | None:
    """The fastest of those that run at all."""
    times = []
    for call in calls:
        with contextlib.suppress(Exception):
            times.append(device.seconds([call]))
    return min(times, default=None)


def ceilings(device: Any) -> dict[str, float]:
    """read and copy in bytes a second, products in operations a second: what this GPU reaches today."""
    numbers = 1 << 12 if device.is_dry else 1 << 31
    source = torch.empty(numbers, dtype=torch.uint8, device=device.where).random_()
    target = torch.empty_like(source)
    words = source.view(torch.float32).nan_to_num_(0.0)
    read = device.seconds([lambda: words.amax()])
    copy = device.seconds([lambda: target.copy_(source)])
    size = 64 if device.is_dry else 8192
    a, b = (torch.randn(size, size, device=device.where).to(torch.bfloat16) for _ in range(2))
    product = device.seconds([lambda: a @ b])
    return {"read": numbers / read, "copy": 2 * numbers / copy, "product": 2 * size**3 / product}


def decode_attention(gpu: Any, device: Any) -> Iterator[Row]:
    """One token of each sequence over its cache."""
    dry = device.is_dry
    steps = [(batch, context) for context in (1024, 4096, 16384) for batch in (1, 8, 32, 128, 256)] + [(1, 131072 - 1)]
    for name in ("1B", "3B", "8B"):
        llama = gpu_inputs.config(name, dry=dry)
        for batch, context in [(2, 300)] if dry else steps:
            row = llama.num_key_value_heads * llama.head_dim * 2 * 2
            if batch * context * row > MOST_BYTES:
                continue
            for scaled in (False, True):
                yield _decode(gpu, device, name, llama, batch, context, scaled=scaled)


def _decode(gpu: Any, device: Any, name: str, llama: Any, batch: int, context: int, *, scaled: bool) -> Row:
    where = device.where
    dtype = torch.float8_e4m3fn if scaled else torch.bfloat16
    step, num_blocks = gpu_inputs.step([1] * batch, [context] * batch, where)
    itemsize = 1 + 4 / llama.head_dim if scaled else 2
    nbytes = 2 * batch * context * llama.num_key_value_heads * llama.head_dim * itemsize
    caches = [
        gpu_inputs.cache(llama, num_blocks, where, dtype=dtype) for _ in range(copies_for(device, int(nbytes), most=16))
    ]
    q = torch.randn(batch, llama.num_attention_heads, llama.head_dim, device=where).to(torch.bfloat16)
    plan = gpu.plan_attention(step.queries, num_heads=llama.num_attention_heads, cache=caches[0])
    seconds = device.seconds([lambda cache=cache: gpu.attention(q, cache, plan) for cache in caches])
    theirs = None if scaled else _torch_decode(device, llama, batch, context)
    kind = "float8" if scaled else "bfloat16"
    return Row(
        "decode attention", f"{name} {kind} batch {batch} context {context}", seconds, nbytes, torch_seconds=theirs
    )


def _torch_decode(device: Any, llama: Any, batch: int, context: int) -> float | None:
    shape = (batch, llama.num_key_value_heads, context, llama.head_dim)
    try:
        keys, values = (torch.randn(shape, device=device.where, dtype=torch.bfloat16) for _ in range(2))
        q = torch.randn(batch, llama.num_attention_heads, 1, llama.head_dim, device=device.where).to(torch.bfloat16)
    except torch.OutOfMemoryError:
        return None
    return best_of_torch(device, [_sdpa(backend, q, keys, values, causal=False) for backend in _BACKENDS])


_BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def _sdpa(backend: SDPBackend, q: Tensor, keys: Tensor, values: Tensor, *, causal: bool) -> Run:
    def run() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, keys, values, is_causal=causal, enable_gqa=True)

    return run


def prefill_attention(gpu: Any, device: Any) -> Iterator[Row]:
    """A whole prompt over itself."""
    where, dry = device.where, device.is_dry
    for name in ("1B", "3B"):
        llama = gpu_inputs.config(name, dry=dry)
        for length in (40,) if dry else (512, 2048, 8192):
            step, num_blocks = gpu_inputs.step([length], [length], where)
            cache = gpu_inputs.cache(llama, num_blocks, where, dtype=torch.bfloat16)
            heads, kv_heads, head_dim = llama.num_attention_heads, llama.num_key_value_heads, llama.head_dim
            q = torch.randn(length, heads, head_dim, device=where).to(torch.bfloat16)
            plan = gpu.plan_attention(step.queries, num_heads=heads, cache=cache)
            seconds = device.seconds([lambda q=q, cache=cache, plan=plan: gpu.attention(q, cache, plan)])
            keys, values = (
                torch.randn(1, kv_heads, length, head_dim, device=where).to(torch.bfloat16) for _ in range(2)
            )
            asked = q.transpose(0, 1)[None].contiguous()
            theirs = best_of_torch(device, [_sdpa(backend, asked, keys, values, causal=True) for backend in _BACKENDS])
            flops = 2 * length * length * heads * head_dim
            yield Row("prefill attention", f"{name} {length} tokens", seconds, flops=flops, torch_seconds=theirs)


def products(gpu: Any, device: Any) -> Iterator[Row]:
    """The layers of the 1B and the 3B."""
    where, dry = device.where, device.is_dry
    shapes = {
        "1B qkv": (3072, 2048), "1B o": (2048, 2048), "1B gate_up": (16384, 2048), "1B down": (2048, 8192),
        "1B head": (128256, 2048), "3B qkv": (5120, 3072), "3B gate_up": (16384, 3072), "3B down": (3072, 8192),
    }  # fmt: skip
    for name, (outputs, inputs) in {"tiny": (48, 64)}.items() if dry else shapes.items():
        copies = copies_for(device, outputs * inputs * 2, most=32)
        weights = [torch.randn(outputs, inputs, device=where).to(torch.bfloat16) for _ in range(copies)]
        for format in ("plain", "int8", "fp8", "int4"):
            if format not in gpu.WEIGHT_FORMATS:
                continue
            packed = [gpu.pack(weight, format) for weight in weights]
            for rows in (2,) if dry else (1, 2, 4, 8, 16, 32, 64, 256, 2048) if format == "plain" else (1, 16, 64):
                x = torch.randn(rows, inputs, device=where).to(torch.bfloat16)
                seconds = device.seconds([lambda x=x, each=each: gpu.linear(x, each) for each in packed])
                theirs = None
                if format == "plain":
                    theirs = device.seconds([lambda x=x, weight=weight: x @ weight.t() for weight in weights])
                yield Row(
                    "product",
                    f"{name} {format} {rows} rows",
                    seconds,
                    nbytes=packed[0].nbytes + rows * (inputs + outputs) * 2,
                    flops=2.0 * rows * inputs * outputs,
                    torch_seconds=theirs,
                )
            del packed


def sampler(gpu: Any, device: Any) -> Iterator[Row]:
    """Rows of logits as wide as the vocabulary."""
    vocab_size = 300 if device.is_dry else 128256
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {},
        "temperature 1": {"temperature": 1.0},
        "top_k 50, top_p 0.9": {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
        "top_p 0.9": {"temperature": 1.0, "top_p": 0.9},
        "penalties on 500 tokens": {"temperature": 1.0, "entries": 10 if device.is_dry else 500},
    }
    for rows in (2,) if device.is_dry else (1, 8, 32, 128, 256):
        copies = copies_for(device, rows * vocab_size * 2, most=16)
        logits = [torch.randn(rows, vocab_size, device=device.where).to(torch.bfloat16) * 4 for _ in range(copies)]
        for name, fields in kinds.items():
            batch = gpu_inputs.sampling(rows, device.where, vocab_size=vocab_size, **fields)
            seconds = device.seconds([lambda each=each, batch=batch: gpu.sample(each, batch) for each in logits])
            theirs = best_of_torch(device, [_torch_sample(logits[0], fields)])
            yield Row("sampler", f"{name}, {rows} rows", seconds, nbytes=rows * vocab_size * 2, torch_seconds=theirs)


def _torch_sample(logits: Tensor, fields: dict[str, Any]) -> Run:
    def run() -> Tensor:
        if "temperature" not in fields:
            return logits.argmax(-1)
        weights = logits.float().softmax(-1)
        if "top_p" in fields:
            ordered, ids = weights.sort(dim=-1, descending=True)
            ordered = torch.where(ordered.cumsum(-1) - ordered > fields["top_p"], 0.0, ordered)
            drawn = (ordered / torch.empty_like(ordered).exponential_()).argmax(-1, keepdim=True)
            return ids.gather(-1, drawn)
        return (weights / torch.empty_like(weights).exponential_()).argmax(-1)

    return run


def whole_steps(gpu: Any, device: Any, *, group: str = "step") -> Iterator[Row]:
    """One token for each sequence through a model of random weights, chosen greedily and fed to the next step, as one
    captured graph; then prompts."""
    dry = device.is_dry
    for name in ("1B",) if dry else ("1B", "3B"):
        llama = gpu_inputs.config(name, dry=dry)
        for format, cache_dtype in (("plain", torch.bfloat16), ("fp8", torch.float8_e4m3fn)):
            if format not in gpu.WEIGHT_FORMATS:
                continue
            model = gpu_inputs.random_model(gpu, llama, device.where, format, num_positions=64 if dry else 16384)
            context = 40 if dry else 1024
            for batch in (2,) if dry else (1, 8, 32, 64, 128, 256):
                seconds, nbytes = _decode_step(gpu, device, model, llama, batch, context, cache_dtype)
                compared = format == "plain" and name == "1B" and batch in (1, 2)
                theirs = _transformers_step(device, llama, batch, context) if compared else None
                yield Row(
                    group,
                    f"{name} {format} weights, batch {batch}, context {context}",
                    seconds,
                    nbytes,
                    tokens=batch,
                    torch_seconds=theirs,
                )
            for length in (20,) if dry else (512, 2048, 8192):
                if format == "plain":
                    seconds, flops = _prefill_step(device, model, llama, length)
                    yield Row(group, f"{name} prompt of {length}", seconds, flops=flops, tokens=length)
            del model


def _decode_step(
    gpu: Any, device: Any, model: Llama, llama: Any, batch: int, context: int, cache_dtype: torch.dtype
) -> tuple[float, float]:
    step, num_blocks = gpu_inputs.step([1] * batch, [context] * batch, device.where)
    layers = [
        gpu_inputs.cache(llama, num_blocks, device.where, dtype=cache_dtype) for _ in range(llama.num_hidden_layers)
    ]
    tokens = torch.zeros(batch, dtype=torch.int64, device=device.where)
    kv = SimpleNamespace(layers=layers)

    def run() -> None:
        hidden = model.forward(tokens, step, kv)  # type: ignore[arg-type]
        ids, _ = gpu.linear_argmax(hidden, model.head.weight)
        tokens.copy_(ids.clamp(min=0))

    with torch.inference_mode():
        seconds = device.seconds([run])
    cached = sum(_bytes_read(layer, batch * context, llama) for layer in layers)
    embedding = 0 if model.embedding.table is model.head.weight else model.embedding.table.nbytes
    return seconds, model.nbytes - embedding - model.cos_sin.nbytes + cached


def _transformers_step(device: Any, llama: Any, batch: int, context: int) -> float | None:
    """The same step by transformers, with a static cache and compiled, where it is installed and runs."""
    try:
        import transformers
    except ImportError:
        return None
    config = transformers.LlamaConfig(
        hidden_size=llama.hidden_size,
        intermediate_size=llama.intermediate_size,
        num_hidden_layers=llama.num_hidden_layers,
        num_attention_heads=llama.num_attention_heads,
        num_key_value_heads=llama.num_key_value_heads,
        head_dim=llama.head_dim,
        vocab_size=llama.vocab_size,
        tie_word_embeddings=llama.tie_word_embeddings,
        max_position_embeddings=llama.max_position_embeddings,
    )
    model = transformers.LlamaForCausalLM(config).to(device.where, torch.bfloat16).eval()
    cache = transformers.StaticCache(config=config, max_cache_len=context + 1)
    known = inspect.signature(model.forward).parameters
    argument = "past_key_values" if "past_key_values" in known else "cache"
    forward = model.forward if device.is_dry else torch.compile(model.forward, fullgraph=True)
    tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device.where)
    place = torch.full((batch, 1), context - 1, device=device.where)
    position = {"cache_position": place[0]} if "cache_position" in known else {}

    def run() -> None:
        logits = forward(tokens, position_ids=place, use_cache=True, **{argument: cache}, **position).logits
        tokens.copy_(logits[:, -1:].argmax(-1))

    with torch.inference_mode():
        return best_of_torch(device, [run])


def _bytes_read(layer: LayerCache, tokens: int, llama: Any) -> float:
    per_token = layer.nbytes / (layer.keys.shape[0] * layer.keys.shape[2])
    return per_token * tokens


def _prefill_step(device: Any, model: Llama, llama: Any, length: int) -> tuple[float, float]:
    step, num_blocks = gpu_inputs.step([length], [length], device.where)
    layers = [
        gpu_inputs.cache(llama, num_blocks, device.where, dtype=torch.bfloat16) for _ in range(llama.num_hidden_layers)
    ]
    tokens = torch.zeros(length, dtype=torch.int64, device=device.where)

    def run() -> None:
        hidden = model.forward(tokens, step, SimpleNamespace(layers=layers))  # type: ignore[arg-type]
        model.logits(hidden[-1:])

    with torch.inference_mode():
        seconds = device.seconds([run])
    weights = [weight for layer in model.layers for weight in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    flops = 2.0 * length * sum(weight.out_features * weight.in_features for weight in weights)
    flops += 2.0 * length * length * llama.num_attention_heads * llama.head_dim * llama.num_hidden_layers
    return seconds, flops


TIMED: dict[str, Callable[[Any, Any], Iterator[Row]]] = {
    "decode-attention": decode_attention,
    "prefill-attention": prefill_attention,
    "products": products,
    "sampler": sampler,
    "steps": whole_steps,
}
