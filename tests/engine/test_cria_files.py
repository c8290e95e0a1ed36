"""The embedded checkpoint as files: they fit together, load in the field's own tools, and stay small. And the recipe:
its tokenizer cuts text as tiktoken does, its prompts are the server's, its paraphrases are what they say."""

from __future__ import annotations

import base64
import json
from collections import Counter
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import pronk.engine.cria
from pronk.engine.cria.recipe import bpe, corpus
from pronk.engine.cria.recipe.batches import copying, talking
from pronk.engine.cria.recipe.model import Llama, Shape, rope_frequencies
from pronk.engine.cria.recipe.paraphrase import choose, expand
from pronk.engine.cria.recipe.prompt import load_encoding, render, render_prompt
from pronk.engine.tokenizer import Tokenizer
from pronk.server.chat.template import ChatTemplate, Message, TemplateFamily, ToolCall

CRIA = Path(pronk.engine.cria.__file__).parent
RANKS = 1792
CONFIG = json.loads((CRIA / "config.json").read_text())


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    return bpe.read(CRIA / "tokenizer.model")


@pytest.fixture(scope="module")
def encoding(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return load_encoding(ranks)


def test_the_rank_file_is_contiguous_and_holds_every_byte() -> None:
    lines = (CRIA / "tokenizer.model").read_text().splitlines()
    assert [int(line.split()[1]) for line in lines] == list(range(RANKS))
    tokens = [base64.b64decode(line.split()[0], validate=True) for line in lines]
    assert len(set(tokens)) == RANKS
    assert tokens[:256] == [bytes([value]) for value in range(256)]


def test_no_token_joins_digits(ranks: dict[bytes, int]) -> None:
    assert [token for token in ranks if len(token) > 1 and any(byte in b"0123456789" for byte in token)] == []


def test_special_tokens_follow_the_ranks_in_the_order_of_llama_3_2(encoding: tiktoken.Encoding) -> None:
    expected = {
        "<|begin_of_text|>": 0,
        "<|end_of_text|>": 1,
        "<|reserved_special_token_0|>": 2,
        "<|finetune_right_pad_id|>": 4,
        "<|reserved_special_token_2|>": 5,
        "<|start_header_id|>": 6,
        "<|end_header_id|>": 7,
        "<|eom_id|>": 8,
        "<|eot_id|>": 9,
        "<|python_tag|>": 10,
        "<|reserved_special_token_3|>": 11,
        "<|reserved_special_token_247|>": 255,
    }
    assert {name: encoding.encode_single_token(name) - RANKS for name in expected} == expected
    assert encoding.n_vocab == CONFIG["vocab_size"]
    assert CONFIG["bos_token_id"] == RANKS
    assert CONFIG["eos_token_id"] == [RANKS + 1, RANKS + 8, RANKS + 9]
    generation = json.loads((CRIA / "generation_config.json").read_text())
    assert generation["eos_token_id"] == CONFIG["eos_token_id"]
    assert generation["do_sample"] is False


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_survives_the_tokenizer(text: str) -> None:
    encoding = load_encoding(bpe.read(CRIA / "tokenizer.model"))
    assert encoding.decode_bytes(encoding.encode_ordinary(text)) == text.encode()


def test_the_weights_have_the_shapes_of_the_config() -> None:
    layers, hidden, middle = CONFIG["num_hidden_layers"], CONFIG["hidden_size"], CONFIG["intermediate_size"]
    queries = CONFIG["num_attention_heads"] * CONFIG["head_dim"]
    keys = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    expected = {"model.embed_tokens.weight": [CONFIG["vocab_size"], hidden], "model.norm.weight": [hidden]}
    for layer in range(layers):
        for name, shape in {
            "input_layernorm": [hidden],
            "self_attn.q_proj": [queries, hidden],
            "self_attn.k_proj": [keys, hidden],
            "self_attn.v_proj": [keys, hidden],
            "self_attn.o_proj": [hidden, queries],
            "post_attention_layernorm": [hidden],
            "mlp.gate_proj": [middle, hidden],
            "mlp.up_proj": [middle, hidden],
            "mlp.down_proj": [hidden, middle],
        }.items():
            expected[f"model.layers.{layer}.{name}.weight"] = shape
    with safe_open(CRIA / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert 3e6 <= sum(tensor.numel() for tensor in tensors.values()) <= 6e6


def test_the_config_is_the_recipes_and_of_the_llama_3_2_family() -> None:
    assert Shape().huggingface_config(RANKS) == CONFIG
    assert CONFIG["tie_word_embeddings"] is True
    assert CONFIG["rope_theta"] == 500000.0
    assert CONFIG["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_everything_together_is_small() -> None:
    files = [path for path in CRIA.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 12_000_000


def test_the_recipes_model_is_the_model_of_transformers(encoding: tiktoken.Encoding) -> None:
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(CRIA, dtype=torch.float32).eval()
    ours = Llama(Shape())
    ours.load_state_dict({name: tensor.float() for name, tensor in load_file(CRIA / "model.safetensors").items()})
    ids = torch.tensor([render_prompt(next(corpus.conversations(1)), encoding)])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-3)
    frequencies = theirs.model.rotary_emb.inv_freq
    torch.testing.assert_close(rope_frequencies(Shape()), frequencies, rtol=1e-5, atol=0.0)


# ---------------------------------------------------------------------------------------- the recipe's tokenizer


@given(st.lists(st.text(alphabet="abcde ", min_size=1, max_size=12), min_size=3, max_size=12), st.integers(256, 270))
@settings(max_examples=60, deadline=None)
def test_trained_ranks_cut_text_as_tiktoken_does(texts: list[str], size: int) -> None:
    pieces = bpe.count_pieces(texts)
    try:
        ranks = bpe.train(pieces, size)
    except ValueError:
        return
    assert sorted(ranks.values()) == list(range(size))
    encoding = load_encoding(ranks)
    for piece in pieces:
        assert [ranks[token] for token in bpe.split(piece, ranks)] == encoding.encode_ordinary(piece.decode())


def test_the_most_frequent_pair_is_learned_first_and_the_smaller_on_ties() -> None:
    ranks = bpe.train(Counter({b"abab": 2, b"cd": 3, b"ba": 0}), 259)
    assert list(ranks)[256:] == [b"ab", b"cd", b"abab"]


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ValueError, match="enough pairs for 257 ranks"):
        bpe.train(Counter({b"ab": 1}), 300)


def test_a_rank_file_is_read_back(tmp_path: Path) -> None:
    ranks = bpe.train(Counter({b"hello": 2, b"help": 1}), 260)
    bpe.write(ranks, tmp_path / "tokenizer.model")
    assert bpe.read(tmp_path / "tokenizer.model") == ranks


# --------------------------------------------------------------------------------------------- the recipe's text


def test_training_prompts_are_the_servers(encoding: tiktoken.Encoding) -> None:
    template = ChatTemplate(Tokenizer.from_folder(CRIA), TemplateFamily.LLAMA_3_2)
    kinds: Counter[str] = Counter()
    for talk in islice(corpus.conversations(7), 300):
        messages = [Message("system", talk.system)] if talk.system else []
        for turn in talk.turns:
            if turn.role == "assistant" and turn.text.startswith('{"name": ') and '"parameters": {' in turn.text:
                call = json.loads(turn.text)
                messages.append(Message("assistant", tool_calls=(ToolCall(call["name"], call["parameters"]),)))
            elif turn.role == "ipython":
                messages.append(Message("tool", json.loads(turn.text)))
            else:
                messages.append(Message(turn.role, turn.text))
            kinds[turn.role] += 1
        expected = template.render(
            messages, tools=list(talk.tools) or None, date_string=talk.date, add_generation_prompt=False
        )
        ids, learned = render(talk, encoding)
        assert ids == expected
        assert len(learned) == len(ids)
        if talk.turns[-1].role == "assistant":
            assert learned[-1]
    assert min(kinds["user"], kinds["assistant"], kinds["ipython"]) > 5


def test_the_same_seed_gives_the_same_text() -> None:
    first, again, other = (list(islice(corpus.conversations(seed), 50)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_batches_learn_answers_and_their_end_and_no_padding(encoding: tiktoken.Encoding) -> None:
    batch = next(talking(5, encoding, 2048, pool=32))
    targets = batch.tokens[:, 1:]
    end = encoding.encode_single_token("<|eot_id|>")
    assert batch.tokens.shape[0] * targets.shape[1] <= 2048
    for row, learned in zip(targets, batch.learned, strict=True):
        assert end in row[learned]
        length = int((row != 0).nonzero().max()) + 1
        assert not learned[length:].any()
        assert not learned[: row.tolist().index(end)].any()  # the system turn


def test_a_returning_span_can_be_copied() -> None:
    batch = next(copying(seed=3, vocabulary=500))
    assert int(batch.learned.sum()) > batch.learned.numel() // 4
    for row, learned in zip(batch.tokens.tolist(), batch.learned.tolist(), strict=True):
        for place in (place for place, said in enumerate(learned) if said):
            pair = row[place : place + 2]
            assert any(row[i : i + 2] == pair for i in range(place))


@given(st.integers())
@settings(max_examples=50, deadline=None)
def test_a_chosen_phrase_is_one_of_the_expanded(seed: int) -> None:
    pattern = "(how|in what way) do (i (start|stop)|we run) (it|) now"
    assert choose(pattern, Random(seed)) in set(expand(pattern))


def test_every_topic_can_be_asked_and_is_answered_once() -> None:
    library = corpus.load_library()
    topics = [*library.manual, *library.smalltalk, library.unknown]
    assert len({topic.name for topic in topics}) == len(topics)
    assert len({topic.answer for topic in topics}) == len(topics)
    for topic in topics:
        questions = set(topic.all_questions())
        assert questions
        assert all("|" not in question and "{}" not in question for question in questions)
