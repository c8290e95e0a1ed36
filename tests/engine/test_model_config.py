"""What `config.json`, `generation_config.json` and `params.json` say, and what in them is refused by name."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pronk.engine.errors import CheckpointError, CheckpointFormatError, CheckpointNotFoundError
from pronk.engine.model.config import GenerationDefaults, LlamaConfig, RopeScaling, load_generation_defaults

ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# The 1B as it is published.
LLAMA_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": ROPE,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
META_1B: dict[str, Any] = {
    "dim": 2048,
    "n_layers": 16,
    "n_heads": 32,
    "n_kv_heads": 8,
    "vocab_size": 128256,
    "ffn_dim_multiplier": 1.5,
    "multiple_of": 256,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
}
SIZES = {
    "3b": {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128},
    "8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "intermediate_size": 14336,
        "tie_word_embeddings": False,
    },
    "guard": {"tie_word_embeddings": False},
}


def huggingface(folder: Path, *, without: str = "", **changes: Any) -> LlamaConfig:
    config = {key: value for key, value in {**LLAMA_1B, **changes}.items() if key != without}
    (folder / "config.json").write_text(json.dumps(config))
    return LlamaConfig.from_huggingface(folder)


def meta(folder: Path, *, without: str = "", tied: bool | None = None, **changes: Any) -> LlamaConfig:
    params = {key: value for key, value in {**META_1B, **changes}.items() if key != without}
    (folder / "params.json").write_text(json.dumps(params))
    return LlamaConfig.from_meta(folder, tie_word_embeddings=tied)


def scaled(factor: float) -> RopeScaling:
    return RopeScaling(factor, 1.0, 4.0, 8192)


def test_the_published_1b(tmp_path: Path) -> None:
    assert huggingface(tmp_path) == LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=scaled(32.0),
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        dtype="bfloat16",
        bos_token_id=128000,
        eos_token_ids=(128001,),
    )


@pytest.mark.parametrize(
    ("size", "group", "parameters", "kv_bytes"),
    [
        ("1b", 4, 1_235_814_400, 32_768),
        ("3b", 3, 3_212_749_824, 114_688),
        ("8b", 4, 8_030_261_248, 131_072),
        ("guard", 4, 1_498_482_688, 32_768),
    ],
)
def test_sizes_that_follow(tmp_path: Path, size: str, group: int, parameters: int, kv_bytes: int) -> None:
    config = huggingface(tmp_path, **SIZES.get(size, {}))
    assert (config.group, config.num_parameters, config.kv_bytes_per_token(2)) == (group, parameters, kv_bytes)


def test_both_spellings_of_rope_agree(tmp_path: Path) -> None:
    older = huggingface(tmp_path)
    oldest = huggingface(
        tmp_path, rope_scaling={**{k: v for k, v in ROPE.items() if k != "rope_type"}, "type": "llama3"}
    )
    newer = huggingface(
        tmp_path, without="rope_theta", rope_scaling=None, rope_parameters={**ROPE, "rope_theta": 500000.0}
    )
    both = huggingface(tmp_path, rope_parameters={**ROPE, "rope_theta": 500000.0})
    assert older == oldest == newer == both


@pytest.mark.parametrize("block", [None, {"rope_type": "default"}, {"rope_theta": 500000.0}])
def test_no_scaling(tmp_path: Path, block: dict[str, Any] | None) -> None:
    config = huggingface(tmp_path, rope_scaling=None, rope_parameters=block)
    assert config.rope_scaling is None
    assert config.rope_theta == 500000.0


def test_factor_is_the_files_own(tmp_path: Path) -> None:
    assert huggingface(tmp_path, rope_scaling={**ROPE, "factor": 8.0}).rope_scaling == scaled(8.0)


def test_what_may_be_missing(tmp_path: Path) -> None:
    assert huggingface(tmp_path, without="head_dim").head_dim == 64
    assert huggingface(tmp_path, head_dim=None).head_dim == 64
    assert huggingface(tmp_path, without="num_key_value_heads").num_key_value_heads == 32
    assert huggingface(tmp_path, without="tie_word_embeddings").tie_word_embeddings is False
    assert huggingface(tmp_path, without="hidden_act").hidden_size == 2048
    assert huggingface(tmp_path, without="architectures").hidden_size == 2048
    assert huggingface(tmp_path, without="bos_token_id").bos_token_id is None


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("spelling", ["float16", "torch.float16"])
def test_dtype_in_both_spellings(tmp_path: Path, key: str, spelling: str) -> None:
    assert huggingface(tmp_path, without="torch_dtype" if key == "dtype" else "", **{key: spelling}).dtype == "float16"


def test_dtype_that_is_not_named(tmp_path: Path) -> None:
    huggingface(tmp_path, without="torch_dtype")
    assert LlamaConfig.from_huggingface(tmp_path, unnamed_dtype="float32").dtype == "float32"


class TestStopTokens:
    """The union of the two files and, for a chat model over Llama 3's vocabulary, the two ends of a turn."""

    def test_union_of_both_files(self, tmp_path: Path) -> None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 3]}))
        assert huggingface(tmp_path, eos_token_id=7).eos_token_ids == (3, 5, 7)

    def test_generation_config_alone(self, tmp_path: Path) -> None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
        assert huggingface(tmp_path, without="eos_token_id").eos_token_ids == (9,)

    @pytest.mark.parametrize("named", [128009, [128001, 128008]])
    def test_a_fine_tune_that_names_one_turn_end(self, tmp_path: Path, named: Any) -> None:
        assert {128008, 128009} <= set(huggingface(tmp_path, eos_token_id=named).eos_token_ids)

    @pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
    def test_a_chat_template_means_turns(self, tmp_path: Path, file: str) -> None:
        (tmp_path / file).write_text(json.dumps({"chat_template": "{{ messages }}"}))
        assert huggingface(tmp_path).eos_token_ids == (128001, 128008, 128009)

    def test_a_base_model_keeps_its_one(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 131072}))
        assert huggingface(tmp_path).eos_token_ids == (128001,)

    def test_another_vocabulary_keeps_its_own(self, tmp_path: Path) -> None:
        (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
        assert huggingface(tmp_path, vocab_size=2048, bos_token_id=1, eos_token_id=2).eos_token_ids == (2,)

    def test_none_at_all(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointFormatError, match="eos_token_id is missing"):
            huggingface(tmp_path, eos_token_id=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["MllamaForConditionalGeneration"], "model_type": "mllama"},
            "vision models are not served yet",
        ),
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "MistralForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"model_type": "qwen3"}, "qwen3"),
        ({"architectures": None, "model_type": None}, "model_type is None"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantization_config \(awq\)"),
        ({"compression_config": {}}, "compression_config"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_scaling\.type is 'linear'"),
        ({"rope_scaling": {**ROPE, "rope_type": "yarn"}}, r"rope_scaling\.rope_type is 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 32.0}}, r"rope_scaling\.low_freq_factor is missing"),
        ({"rope_scaling": {**ROPE, "factor": 0.5}}, "factor is 0.5"),
        ({"rope_scaling": {**ROPE, "low_freq_factor": 4.0}}, "low_freq_factor is 4.0"),
        ({"rope_scaling": {**ROPE, "original_max_position_embeddings": 0}}, "original_max_position_embeddings is 0"),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\]"),
        ({"rope_parameters": {**ROPE, "factor": 8.0}}, "rope_scaling and rope_parameters disagree"),
        ({"rope_parameters": {**ROPE, "rope_theta": 10000.0}}, "rope_theta is given as"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"vocab_size": 2048.5}, "vocab_size is 2048.5"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"intermediate_size": "8192"}, "intermediate_size is '8192'"),
        ({"num_key_value_heads": 5}, "multiple of num_key_value_heads, 5"),
        ({"num_attention_heads": 0, "head_dim": None}, "number of heads, 0"),
        ({"hidden_size": 2049, "head_dim": None}, "hidden_size is 2049"),
        ({"head_dim": 63}, "head_dim is 63"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"rms_norm_eps": True}, "rms_norm_eps is True"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"eos_token_id": [128256]}, "token 128256 is beyond the vocabulary"),
        ({"bos_token_id": -1}, "token -1 is beyond the vocabulary"),
    ],
)
def test_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointFormatError, match=message) as caught:
        huggingface(tmp_path, **changes)
    assert str(tmp_path / "config.json") in str(caught.value)


REQUIRED = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
]


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(CheckpointFormatError, match=rf"config\.json: {key} is missing"):
        huggingface(tmp_path, without=key)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", "\xff\xfe", '{"a": ' + "[" * 100_000])
@pytest.mark.parametrize("file", ["config.json", "params.json", "generation_config.json"])
def test_damaged_json(tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_1B))
    (tmp_path / file).write_bytes(text.encode("latin-1"))
    read = LlamaConfig.from_meta if file == "params.json" else LlamaConfig.from_huggingface
    with pytest.raises(CheckpointFormatError, match=re.escape(f"{tmp_path / file} is damaged")):
        read(tmp_path)


def test_no_config(tmp_path: Path) -> None:
    for read in (LlamaConfig.from_folder, LlamaConfig.from_huggingface, LlamaConfig.from_meta):
        with pytest.raises(CheckpointNotFoundError, match=re.escape(str(tmp_path))):
            read(tmp_path)


def test_a_folder_is_read_by_what_it_holds(tmp_path: Path) -> None:
    from_meta = meta(tmp_path, norm_eps=1e-6)
    assert LlamaConfig.from_folder(tmp_path) == from_meta
    from_huggingface = huggingface(tmp_path)
    assert LlamaConfig.from_folder(tmp_path) == from_huggingface
    assert from_huggingface != from_meta


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from([*ROPE, "quant_method"]), inner),
    max_leaves=4,
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from([*LLAMA_1B, "rope_parameters", "quantization_config"]), json_values, min_size=1))
def test_no_value_brings_another_error(tmp_path: Path, changes: dict[str, Any]) -> None:
    try:
        config = huggingface(tmp_path, **changes)
    except CheckpointError:
        return
    assert config.num_parameters > 0
    assert config.group * config.num_key_value_heads == config.num_attention_heads


class TestMeta:
    def test_the_published_1b(self, tmp_path: Path) -> None:
        instruct = huggingface(tmp_path, eos_token_id=[128001, 128008, 128009])
        assert meta(tmp_path) == instruct

    @pytest.mark.parametrize(
        ("dim", "multiplier", "multiple_of", "width"),
        [
            (2048, 1.5, 256, 8192),
            (3072, 1.0, 256, 8192),
            (4096, 1.3, 1024, 14336),
            (8192, 1.3, 4096, 28672),
            (16384, 1.2, 4096, 53248),
            (4096, None, 256, 11008),
        ],
    )
    def test_width_of_the_mlp(
        self, tmp_path: Path, dim: int, multiplier: float | None, multiple_of: int, width: int
    ) -> None:
        config = meta(tmp_path, dim=dim, ffn_dim_multiplier=multiplier, multiple_of=multiple_of)
        assert config.intermediate_size == width

    def test_an_explicit_width_wins(self, tmp_path: Path) -> None:
        assert meta(tmp_path, hidden_dim=6400).intermediate_size == 6400

    @pytest.mark.parametrize(
        ("changes", "tied", "scaling"),
        [
            ({}, True, scaled(32.0)),
            ({}, None, scaled(32.0)),
            ({"dim": 3072, "n_layers": 28, "n_heads": 24}, True, scaled(32.0)),
            ({}, False, scaled(8.0)),  # Llama Guard 3 1B
            ({"dim": 4096, "n_layers": 32}, None, scaled(8.0)),
            ({"rope_scale_factor": 8}, True, scaled(8.0)),
            ({"rope_scale_factor": 32, "dim": 4096}, False, scaled(32.0)),
            ({"use_scaled_rope": False}, True, None),
        ],
    )
    def test_rotary_factor(
        self, tmp_path: Path, changes: dict[str, Any], tied: bool | None, scaling: RopeScaling | None
    ) -> None:
        config = meta(tmp_path, tied=tied, **changes)
        assert config.rope_scaling == scaling
        assert config.max_position_embeddings == (8192 if scaling is None else 131072)

    def test_special_tokens_follow_the_ranks(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.model").write_text("AA== 0\nAQ== 1\nAg== 2\n")
        config = meta(tmp_path, vocab_size=-1)
        assert (config.vocab_size, config.bos_token_id, config.eos_token_ids) == (259, 3, (4, 11, 12))

    def test_the_embedding_says_the_vocabulary_that_the_file_does_not(self, tmp_path: Path) -> None:
        meta(tmp_path, without="ffn_dim_multiplier")
        (tmp_path / "params.json").write_text(json.dumps({k: v for k, v in META_1B.items() if k != "vocab_size"}))
        assert LlamaConfig.from_meta(tmp_path, embedding_rows=512).vocab_size == 512

    def test_a_key_nobody_knows_is_ignored(self, tmp_path: Path) -> None:
        assert meta(tmp_path, quantization_args=None, vision_chunk_size=-1, some_key=[1]).hidden_size == 2048

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"vision_chunk_size": 560}, "vision models are not served yet"),
            ({"quantization_args": {"scheme": "int4_weight_int8_dynamic_activation"}}, "quantization_args"),
            ({"lora_args": {"rank": 16}}, "lora_args"),
            ({"moe_args": {"num_experts": 16}}, "moe_args"),
            ({"multiple_of": 0}, "multiple_of is 0"),
            ({"dim": 2049}, "dim is 2049"),
            ({"n_kv_heads": 7}, "num_key_value_heads, 7"),
            ({"vocab_size": 100}, "vocab_size is 100"),
            ({"vocab_size": None}, "vocab_size is not given"),
            ({"rope_scale_factor": 0}, "rope_scale_factor"),
        ],
    )
    def test_refused_by_name(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(CheckpointFormatError, match=message) as caught:
            meta(tmp_path, **changes)
        assert str(tmp_path / "params.json") in str(caught.value)

    @pytest.mark.parametrize("key", ["dim", "n_layers", "n_heads", "multiple_of", "norm_eps", "rope_theta"])
    def test_a_missing_key_is_named(self, tmp_path: Path, key: str) -> None:
        with pytest.raises(CheckpointFormatError, match=rf"params\.json: {key} is missing"):
            meta(tmp_path, without=key)


class TestGenerationDefaults:
    def test_the_published_ones(self, tmp_path: Path) -> None:
        (tmp_path / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.6, "top_p": 0.9}')
        assert load_generation_defaults(tmp_path) == GenerationDefaults(True, 0.6, 0.9, None)

    def test_no_file(self, tmp_path: Path) -> None:
        assert load_generation_defaults(tmp_path) == GenerationDefaults(None, None, None, None)

    def test_zero_and_false_are_values(self, tmp_path: Path) -> None:
        (tmp_path / "generation_config.json").write_text('{"do_sample": false, "temperature": 0, "top_k": 0}')
        assert load_generation_defaults(tmp_path) == GenerationDefaults(False, 0.0, None, 0)

    @pytest.mark.parametrize(
        ("key", "value"),
        [("temperature", -0.1), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1), ("top_k", 1.5), ("do_sample", 1)],
    )
    def test_nonsense_is_named(self, tmp_path: Path, key: str, value: Any) -> None:
        (tmp_path / "generation_config.json").write_text(json.dumps({key: value}))
        with pytest.raises(CheckpointFormatError, match=f"generation_config.json: {key} is"):
            load_generation_defaults(tmp_path)


def test_reading_a_config_imports_no_torch() -> None:
    code = "import sys, pronk.engine.model.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
