"""What a model is: its sizes, its rotary scaling, and the tokens that end its answers.

Read from Hugging Face's `config.json` or Meta's `params.json`. It knows no tensor and imports no torch, because the
server's process reads it too. What Pronk does not serve is refused here, by name, before a byte of weights is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from pronk.engine.errors import CheckpointFormatError, CheckpointNotFoundError
from pronk.engine.weights.json_object import JsonObject

DTYPES = ("bfloat16", "float16", "float32")

# The 256 special tokens follow the ranks of Llama 3's tokenizer in a fixed order; these are places in that order.
LLAMA3_RANKS = 128000
SPECIAL_TOKENS = 256
BEGIN_OF_TEXT, END_OF_TEXT, END_OF_MESSAGE, END_OF_TURN = 0, 1, 8, 9

# (dim, n_layers) of the 3.2 text models. Meta's params.json does not say the rotary factor, and theirs is another.
META_FACTOR_32 = ((2048, 16), (3072, 28))


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of the rotary wavelengths; the formula is in `pronk.engine.model.rope`.

    Wavelengths, in tokens, above original_max_position_embeddings / low_freq_factor are made `factor` times longer,
    those below original_max_position_embeddings / high_freq_factor stay, those between are blended.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        """Raises CheckpointFormatError when the numbers cannot be a scaling."""
        if self.factor < 1:
            raise CheckpointFormatError(f"the rope factor is {self.factor}: it must be 1 or more")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise CheckpointFormatError(
                f"low_freq_factor is {self.low_freq_factor} and high_freq_factor is {self.high_freq_factor}: "
                "the first must be above 0 and below the second"
            )
        if self.original_max_position_embeddings < 1:
            raise CheckpointFormatError(
                f"original_max_position_embeddings is {self.original_max_position_embeddings}: it must be 1 or more"
            )


@dataclass(frozen=True)
class LlamaConfig:
    """One Llama decoder. The names are those of Hugging Face's `config.json`.

    head_dim: numbers in one head. rope_theta: the rotary base. max_position_embeddings: the longest context, in tokens.
    dtype: the name of the type the checkpoint asks to be run in. bos_token_id: None when the checkpoint names none.
    eos_token_ids: every token that ends an answer, ascending.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raises CheckpointFormatError when the values cannot be a Llama."""
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise CheckpointFormatError(f"{name} is {getattr(self, name)}: it must be 1 or more")
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointFormatError(
                f"num_attention_heads is {self.num_attention_heads}: it must be a multiple of "
                f"num_key_value_heads, {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise CheckpointFormatError(f"head_dim is {self.head_dim}: it must be even, for rotary pairs")
        for name in ("rms_norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < math.inf:
                raise CheckpointFormatError(f"{name} is {getattr(self, name)}: it must be above 0")
        if self.dtype not in DTYPES:
            raise CheckpointFormatError(f"dtype is {self.dtype!r}: it must be one of {', '.join(DTYPES)}")
        named = self.eos_token_ids if self.bos_token_id is None else (self.bos_token_id, *self.eos_token_ids)
        for token in named:
            if not 0 <= token < self.vocab_size:
                raise CheckpointFormatError(f"token {token} is beyond the vocabulary of {self.vocab_size}")

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def num_parameters(self) -> int:
        """Numbers in the weights; a tied head is counted once."""
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        attention = 2 * self.hidden_size * (queries + keys)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        tables = 1 if self.tie_word_embeddings else 2
        return self.num_hidden_layers * layer + tables * self.vocab_size * self.hidden_size + self.hidden_size

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes that one token's keys and values take in all layers, at `dtype_bytes` a number."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * dtype_bytes

    @classmethod
    def from_folder(cls, folder: Path) -> LlamaConfig:
        """`config.json` where there is one, else `params.json`.

        From `params.json` alone, whether the head is tied is a guess (see `from_meta`); `Checkpoint.config` knows.
        """
        if (folder / "config.json").is_file():
            return cls.from_huggingface(folder)
        if (folder / "params.json").is_file():
            return cls.from_meta(folder)
        raise CheckpointNotFoundError(
            f"{folder} holds neither config.json nor params.json: give the folder of a Hugging Face or Meta checkpoint"
        )

    @classmethod
    def from_huggingface(cls, folder: Path, *, unnamed_dtype: str = "bfloat16") -> LlamaConfig:
        """Reads `config.json`, with the stop tokens of `generation_config.json` and Llama 3's own added.

        unnamed_dtype: what `dtype` becomes when the file names none.
        Raises CheckpointNotFoundError, or CheckpointFormatError for what is damaged, missing, or not served.
        """
        config = JsonObject.read(folder / "config.json")
        _refuse_other_models(config)
        _refuse_other_layers(config)
        rope_theta, rope_scaling = _read_rope(config)
        heads = config.integer("num_attention_heads")
        vocab_size = config.integer("vocab_size")
        return _build(
            config.path,
            hidden_size=config.integer("hidden_size"),
            intermediate_size=config.integer("intermediate_size"),
            num_hidden_layers=config.integer("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=config.integer("num_key_value_heads") if config.has("num_key_value_heads") else heads,
            head_dim=config.integer("head_dim")
            if config.has("head_dim")
            else _even_share(config, "hidden_size", heads),
            vocab_size=vocab_size,
            rms_norm_eps=config.number("rms_norm_eps"),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_position_embeddings=config.integer("max_position_embeddings"),
            tie_word_embeddings=config.flag("tie_word_embeddings", default=False),
            dtype=_read_dtype(config, unnamed_dtype),
            bos_token_id=config.integer("bos_token_id") if config.has("bos_token_id") else None,
            eos_token_ids=_stop_tokens(config, folder, vocab_size),
        )

    @classmethod
    def from_meta(
        cls,
        folder: Path,
        *,
        embedding_rows: int | None = None,
        tie_word_embeddings: bool | None = None,
        dtype: str = "bfloat16",
    ) -> LlamaConfig:
        """Reads `params.json`.

        The file does not say everything. Whoever has read the weights passes what they say: the rows of the embedding,
        whether the head is tied to it, its dtype. Without them a vocabulary that params.json leaves open is that of
        `tokenizer.model`, and the head is taken as tied for the sizes of the 3.2 1B and 3B.

        The rotary factor is not in the released files either: it is 32 for a tied model of the size of the 3.2 1B and
        3B, and 8 for every other, Llama Guard 3 1B among them, which is a 1B with a head of its own. A key
        `rope_scale_factor` in params.json overrides this. `use_scaled_rope` false means no scaling, and Llama 3's
        context of 8192; true means 131072.

        Raises CheckpointNotFoundError, or CheckpointFormatError for what is damaged, missing, or not served.
        """
        params = JsonObject.read(folder / "params.json")
        refuse_other_meta_models(params)
        dim, layers, heads = params.integer("dim"), params.integer("n_layers"), params.integer("n_heads")
        if tie_word_embeddings is None:
            tie_word_embeddings = (dim, layers) in META_FACTOR_32
        scaled = params.flag("use_scaled_rope", default=False)
        ranks = _count_ranks(folder / "tokenizer.model")
        vocab_size = _meta_vocab_size(params, embedding_rows, ranks)
        special = vocab_size - SPECIAL_TOKENS if ranks is None else ranks
        if special < 0 or special + SPECIAL_TOKENS > vocab_size:
            raise params.error(
                "vocab_size",
                f"is {vocab_size}, too few for the {max(special, 0)} ranks of tokenizer.model and Llama 3's "
                f"{SPECIAL_TOKENS} special tokens",
            )
        return _build(
            params.path,
            hidden_size=dim,
            intermediate_size=_meta_intermediate_size(params, dim),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=params.integer("n_kv_heads") if params.has("n_kv_heads") else heads,
            head_dim=_even_share(params, "dim", heads),
            vocab_size=vocab_size,
            rms_norm_eps=params.number("norm_eps"),
            rope_theta=params.number("rope_theta"),
            rope_scaling=_meta_rope_scaling(params, tied_3_2=tie_word_embeddings and (dim, layers) in META_FACTOR_32)
            if scaled
            else None,
            max_position_embeddings=131072 if scaled else 8192,
            tie_word_embeddings=tie_word_embeddings,
            dtype=dtype,
            bos_token_id=special + BEGIN_OF_TEXT,
            eos_token_ids=(special + END_OF_TEXT, special + END_OF_MESSAGE, special + END_OF_TURN),
        )


_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class GenerationDefaults:
    """The sampling that a checkpoint recommends in `generation_config.json`; None where it says nothing."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None


def load_generation_defaults(folder: Path) -> GenerationDefaults:
    """No file means no defaults. Raises CheckpointFormatError for a damaged file, or a value no sampler could use."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return GenerationDefaults()
    config = JsonObject.read(path)
    temperature = config.number("temperature") if config.has("temperature") else None
    top_p = config.number("top_p") if config.has("top_p") else None
    top_k = config.integer("top_k") if config.has("top_k") else None
    if temperature is not None and temperature < 0:
        raise config.error("temperature", f"is {temperature}: it must be 0 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise config.error("top_p", f"is {top_p}: it must be above 0 and at most 1")
    if top_k is not None and top_k < 0:
        raise config.error("top_k", f"is {top_k}: it must be 0 or more")
    do_sample = config.flag("do_sample", default=False) if config.has("do_sample") else None
    return GenerationDefaults(do_sample, temperature, top_p, top_k)


def _build(path: Path, **fields: object) -> LlamaConfig:
    """A LlamaConfig whose complaints name the file they come from."""
    try:
        return LlamaConfig(**fields)  # type: ignore[arg-type]
    except CheckpointFormatError as error:
        raise CheckpointFormatError(f"{path}: {error}") from error


def _even_share(config: JsonObject, key: str, heads: int) -> int:
    """head_dim where the file does not give it: the width divided by the heads."""
    width = config.integer(key)
    if heads < 1 or width % heads:
        raise config.error(key, f"is {width}: it must be a multiple of the number of heads, {heads}")
    return width // heads


def _refuse_other_models(config: JsonObject) -> None:
    model_type = config.get("model_type")
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else [architectures] if architectures else []
    if model_type == "mllama" or "MllamaForConditionalGeneration" in names:
        raise config.error("architectures", "names Llama 3.2 Vision: vision models are not served yet")
    if names and "LlamaForCausalLM" not in names:
        raise config.error("architectures", f"is {names}: Pronk serves LlamaForCausalLM")
    if model_type != "llama" and (model_type is not None or not names):
        raise config.error("model_type", f"is {model_type!r}: Pronk serves models of type 'llama'")
    for key in ("quantization_config", "compression_config"):
        quantized = config.child(key)
        if quantized is not None:
            method = quantized.text("quant_method", default="unnamed")
            raise config.error(key, f"({method}) means quantised weights, which are not served yet: use BF16 weights")


def _refuse_other_layers(config: JsonObject) -> None:
    for key in ("attention_bias", "mlp_bias"):
        if config.flag(key, default=False):
            raise config.error(key, "is true: linear layers with a bias are not served")
    activation = config.text("hidden_act", default="silu")
    if activation != "silu":
        raise config.error("hidden_act", f"is {activation!r}: Llama's is 'silu', no other is served")


def _read_dtype(config: JsonObject, unnamed: str) -> str:
    key = "dtype" if config.has("dtype") else "torch_dtype"
    return config.text(key, default=unnamed).removeprefix("torch.")


def _read_rope(config: JsonObject) -> tuple[float, RopeScaling | None]:
    """The rotary base and scaling: older files spell `rope_theta` and `rope_scaling`, newer ones `rope_parameters`."""
    blocks = [block for block in (config.child("rope_scaling"), config.child("rope_parameters")) if block is not None]
    for holder in (config, *blocks):
        if holder.has("partial_rotary_factor") and holder.number("partial_rotary_factor") != 1:
            raise holder.error("partial_rotary_factor", f"is {holder.get('partial_rotary_factor')}: only 1 is served")
    scalings = {_read_rope_scaling(block) for block in blocks}
    if len(scalings) > 1:
        raise config.error("rope_scaling", "and rope_parameters disagree: remove the wrong one")
    thetas = {holder.number("rope_theta") for holder in (config, *blocks) if holder.has("rope_theta")}
    if not thetas:
        raise config.error("rope_theta", "is missing")
    if len(thetas) > 1:
        raise config.error("rope_theta", f"is given as {sorted(thetas)}: remove the wrong one")
    return thetas.pop(), scalings.pop() if scalings else None


def _read_rope_scaling(block: JsonObject) -> RopeScaling | None:
    key = "rope_type" if block.has("rope_type") else "type"
    rope_type = block.text(key, default="default")
    if rope_type == "default":
        return None
    if rope_type != "llama3":
        raise block.error(key, f"is {rope_type!r}: 'llama3' and 'default' are served")
    values = {
        "factor": block.number("factor"),
        "low_freq_factor": block.number("low_freq_factor"),
        "high_freq_factor": block.number("high_freq_factor"),
    }
    original = block.integer("original_max_position_embeddings")
    try:
        return RopeScaling(**values, original_max_position_embeddings=original)
    except CheckpointFormatError as error:
        raise CheckpointFormatError(f"{block.path}: {block.prefix.rstrip('.')}: {error}") from error


def _stop_tokens(config: JsonObject, folder: Path, vocab_size: int) -> tuple[int, ...]:
    """The union of what both files name and, for a chat model over Llama 3's vocabulary, its two ends of a turn.

    Fine-tuned checkpoints often name only one of the three.
    """
    named = set(config.integers("eos_token_id"))
    generation = folder / "generation_config.json"
    if generation.is_file():
        named.update(JsonObject.read(generation).integers("eos_token_id"))
    turn_ends = {LLAMA3_RANKS + END_OF_MESSAGE, LLAMA3_RANKS + END_OF_TURN}
    has_table = vocab_size >= LLAMA3_RANKS + SPECIAL_TOKENS and config.get("bos_token_id") == LLAMA3_RANKS
    if has_table and (named & turn_ends or _has_chat_template(folder)):
        named |= turn_ends
    if not named:
        raise config.error("eos_token_id", "is missing, and generation_config.json names none: answers could not end")
    return tuple(sorted(named))


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    tokenizer_config = folder / "tokenizer_config.json"
    return tokenizer_config.is_file() and JsonObject.read(tokenizer_config).has("chat_template")


def refuse_other_meta_models(params: JsonObject) -> None:
    """Raises CheckpointFormatError when `params.json` is that of a model that Pronk does not serve."""
    for key in ("vision_chunk_size", "vision_num_cross_attention_layers"):
        if params.has(key) and params.integer(key) > 0:
            raise params.error(key, "means Llama 3.2 Vision: vision models are not served yet")
    for key in ("quantization_args", "lora_args"):
        if params.get(key):
            raise params.error(key, "means quantised weights, which are not served yet: use the BF16 release")
    if params.get("moe_args"):
        raise params.error("moe_args", "means a mixture of experts: Pronk serves Llama 3, 3.1, 3.2 and 3.3")


def _meta_intermediate_size(params: JsonObject, dim: int) -> int:
    """The width of the MLP: two thirds of 4 * dim, times the multiplier, rounded up; an explicit `hidden_dim` wins."""
    if params.has("hidden_dim"):
        return params.integer("hidden_dim")
    width = int(2 * (4 * dim) / 3)
    if params.has("ffn_dim_multiplier"):
        width = int(params.number("ffn_dim_multiplier") * width)
    multiple = params.integer("multiple_of")
    if multiple < 1:
        raise params.error("multiple_of", f"is {multiple}: it must be 1 or more")
    return multiple * -(-width // multiple)


def _meta_rope_scaling(params: JsonObject, *, tied_3_2: bool) -> RopeScaling:
    factor = params.number("rope_scale_factor") if params.has("rope_scale_factor") else 32.0 if tied_3_2 else 8.0
    try:
        return RopeScaling(factor, 1.0, 4.0, 8192)
    except CheckpointFormatError as error:
        raise params.error("rope_scale_factor", f"cannot be used: {error}") from error


def _meta_vocab_size(params: JsonObject, embedding_rows: int | None, ranks: int | None) -> int:
    """Some files say -1, or nothing, and leave it to the weights and the tokenizer."""
    if params.has("vocab_size") and params.integer("vocab_size") != -1:
        return params.integer("vocab_size")
    if embedding_rows is not None:
        return embedding_rows
    if ranks is None:
        raise params.error("vocab_size", "is not given, and tokenizer.model, which would tell it, is missing")
    return ranks + SPECIAL_TOKENS


def _count_ranks(tokenizer_model: Path) -> int | None:
    """Lines of a tiktoken rank file, one a token, or None when it is not there."""
    if not tokenizer_model.is_file():
        return None
    with tokenizer_model.open("rb") as lines:
        return sum(1 for line in lines if line.strip())
