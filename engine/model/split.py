"""A model split over ranks: which heads, which columns of the MLP and which token ids each of them has.

The split is Megatron's (Shoeybi et al. 2019, arXiv 1909.08053, section 3): the products that open attention and MLP are
cut by outputs, those that close them by inputs, so that a rank needs the others twice in a layer. It is arithmetic: it
knows no tensor, no file and no other rank, and imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pronk.engine.errors import ConfigError
from pronk.engine.model.config import LlamaConfig
from pronk.engine.weights.cut import Cut

# Token ids are dealt out by so many, so that a mask of 32-bit words is cut between two words.
VOCAB_UNIT = 64


@dataclass(frozen=True)
class Split:
    """What rank `rank` of `size` has of `model`. Make one with `split_of`, which sees that it can be.

    model: the whole model's config. config: the rank's own: its query heads, its key/value heads, its part of the
    MLP's width; every other field, the vocabulary too, is the model's.
    """

    model: LlamaConfig
    config: LlamaConfig
    rank: int
    size: int

    @property
    def first_query_head(self) -> int:
        return self.rank * self.config.num_attention_heads

    @property
    def first_kv_head(self) -> int:
        """Where there are fewer key/value heads than ranks, neighbouring ranks have the same one."""
        return self.rank * self.model.num_key_value_heads // self.size

    @property
    def vocab_per_rank(self) -> int:
        """Token ids of each rank; those of the last ranks may lie beyond the vocabulary. All of it for one rank."""
        if self.size == 1:
            return self.model.vocab_size
        return _ceil_div(self.model.vocab_size, self.size * VOCAB_UNIT) * VOCAB_UNIT

    @property
    def vocab_start(self) -> int:
        """The first token id that the rank has: rank · vocab_per_rank, or `vocab_stop` where that does not exist."""
        return min(self.rank * self.vocab_per_rank, self.model.vocab_size)

    @property
    def vocab_stop(self) -> int:
        """The id after the last that the rank has and that exists; `vocab_start` for a rank that has none."""
        return min((self.rank + 1) * self.vocab_per_rank, self.model.vocab_size)

    def cut(self, name: str) -> Cut | None:
        """The rank's part of the tensor of that canonical name (`pronk.engine.weights.names`); None: all of it."""
        if self.size == 1:
            return None
        match name.removesuffix(".weight").rpartition(".")[2]:
            case "q_proj":
                return self._heads(0, self.first_query_head, self.config.num_attention_heads)
            case "k_proj" | "v_proj":
                return self._heads(0, self.first_kv_head, self.config.num_key_value_heads)
            case "o_proj":
                return self._heads(1, self.first_query_head, self.config.num_attention_heads)
            case "gate_proj" | "up_proj":
                return self._width(0)
            case "down_proj":
                return self._width(1)
            case "embed_tokens" | "lm_head":
                return Cut(0, self.vocab_start, self.vocab_stop)
            case "input_layernorm" | "post_attention_layernorm" | "norm":
                return None
        raise ValueError(f"{name} is no tensor of a Llama")

    def _heads(self, axis: int, first: int, number: int) -> Cut:
        size = self.config.head_dim
        return Cut(axis, first * size, (first + number) * size)

    def _width(self, axis: int) -> Cut:
        width = self.config.intermediate_size
        return Cut(axis, self.rank * width, (self.rank + 1) * width)


def split_of(config: LlamaConfig, rank: int, size: int) -> Split:
    """The part of rank `rank`, 0 to `size` - 1.

    Raises ConfigError when the model cannot be split so, ValueError for a rank that is none of them.
    """
    _check(config, size)
    if not 0 <= rank < size:
        raise ValueError(f"rank {rank} is none of {size}")
    return Split(model=config, config=_config_of_rank(config, size), rank=rank, size=size)


def check_groups(split: Split, group: int) -> None:
    """Raises ConfigError unless the products that are cut by inputs have whole groups of `group` inputs on each rank,
    as int4 weights need, which have one scale for each group. A model that is not split is not looked at.
    """
    _check(split.model, split.size, group)


def possible_sizes(config: LlamaConfig, group: int = 1) -> list[int]:
    """Every size that the model can be split for, ascending; 1 is one of them. group: see `check_groups`."""
    return [size for size in range(1, config.num_attention_heads + 1) if not _fault(config, size, group)]


def _check(config: LlamaConfig, size: int, group: int = 1) -> None:
    fault = _fault(config, size, group)
    if fault:
        choices = _choices(possible_sizes(config, group))
        raise ConfigError(f"--tensor-parallel-size {size}: {fault}: choose {choices}")


def _fault(config: LlamaConfig, size: int, group: int) -> str:
    """What does not divide, or nothing."""
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    if size == 1:
        return ""
    if size < 1:
        return "at least 1 rank must run the model"
    if heads % size:
        return f"the model's {heads} query heads cannot be dealt out evenly"
    if kv_heads % size and size % kv_heads:
        return f"the model's {kv_heads} key/value heads can be neither dealt out nor repeated evenly"
    if width % size:
        return f"the MLP's width of {width} cannot be cut evenly"
    for name, inputs in (("o_proj", heads * config.head_dim), ("down_proj", width)):
        if inputs // size % group:
            return f"the {inputs} inputs of {name} cannot be cut into whole groups of {group}, which int4 weights need"
    return ""


def _config_of_rank(config: LlamaConfig, size: int) -> LlamaConfig:
    return replace(
        config,
        num_attention_heads=config.num_attention_heads // size,
        num_key_value_heads=max(config.num_key_value_heads // size, 1),
        intermediate_size=config.intermediate_size // size,
    )


def _choices(sizes: list[int]) -> str:
    """ "1, 2 or 4"."""
    *others, last = map(str, sizes)
    return f"{', '.join(others)} or {last}" if others else last


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)
