"""The command: flags, environment, precedence; every mistake is one sentence and an exit code that is not 0."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from pronk.engine.config import EngineConfig
from pronk.engine.errors import ConfigError
from pronk.engine.torchrun import Position
from pronk.server import cli
from pronk.server.config import ServerConfig
from pronk.server.options import assemble, options_of, warnings_about

OPTIONS = list(options_of(ServerConfig))
PROMISED = {
    "--host", "--port", "--api-key", "--served-model-name", "--dtype", "--device", "--max-model-len", "--max-num-seqs",
    "--max-num-batched-tokens", "--block-size", "--kv-cache-memory", "--load-format", "--tensor-parallel-size",
    "--seed", "--no-enable-prefix-caching", "--shutdown-timeout", "--log-level", "--allowed-origins", "--max-waiting",
    "--keep-alive", "--stream-timeout", "--max-stored-responses", "--kv-cache-dtype", "--enforce-eager",
    "--quantization", "--vendor-products", "--cpu-threads", "--step-timeout", "--start-timeout", "--weights-cache",
    "--max-num-prompt-tokens",
}  # fmt: skip


class Served(Exception):
    """Carries the config that `serve` was called with."""


@pytest.fixture(autouse=True)
def caught_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve` is not run: it hands over what it was given."""

    def serve(config: ServerConfig, newborn: object) -> int:
        raise Served(config)

    monkeypatch.setattr("pronk.server.lifecycle.serve", serve)
    monkeypatch.setattr("pronk.server.cli.Newborn", FakeNewborn)


class FakeNewborn:
    """No process."""

    made: ClassVar[list[FakeNewborn]] = []

    def __init__(self) -> None:
        self.made.append(self)
        self.has_ended = False

    def end(self) -> None:
        self.has_ended = True


def test_a_host_that_was_started_early_does_not_stay() -> None:
    before = len(FakeNewborn.made)
    config_of("")
    assert [each.has_ended for each in FakeNewborn.made[before:]] == [True]


def config_of(arguments: str, **environment: str) -> ServerConfig:
    with pytest.raises(Served) as caught:
        cli.main(["serve", *arguments.split()], environment)
    config = caught.value.args[0]
    assert isinstance(config, ServerConfig)
    return config


def test_the_promised_flags_are_there_and_no_others() -> None:
    assert {option.flag for option in OPTIONS} == PROMISED


def test_variables_are_named_after_flags() -> None:
    assert {option.flag: option.variable for option in OPTIONS}["--kv-cache-memory"] == "PRONK_KV_CACHE_MEMORY"


def test_defaults() -> None:
    assert config_of("") == ServerConfig()


def test_every_flag_reaches_its_field() -> None:
    config = config_of(
        "some/model --host ::1 --port 0 --api-key a,b --served-model-name x,y --dtype float32 --device cpu "
        "--max-model-len 100 --max-num-seqs 3 --max-num-batched-tokens 64 --block-size 32 --kv-cache-memory 1GiB "
        "--load-format dummy --tensor-parallel-size 1 --seed -7 --no-enable-prefix-caching --shutdown-timeout 1.5 "
        "--log-level debug"
    )
    engine = config.engine
    assert (config.host, config.port, config.api_keys, config.served_model_names) == ("::1", 0, ("a", "b"), ("x", "y"))
    assert (config.shutdown_timeout, config.log_level) == (1.5, "debug")
    assert (engine.model, engine.dtype, engine.device, engine.load_format) == ("some/model", "float32", "cpu", "dummy")
    assert (engine.max_model_len, engine.tensor_parallel_size, engine.seed) == (100, 1, -7)
    assert (engine.scheduler.max_num_seqs, engine.scheduler.max_num_batched_tokens) == (3, 64)
    cache = engine.cache
    assert (cache.block_size, cache.memory, cache.enable_prefix_caching) == (32, "1GiB", False)


def test_every_variable_reaches_its_field() -> None:
    by_flags = config_of("m --port 1 --api-key a,b --dtype float32 --block-size 32 --no-enable-prefix-caching")
    by_variables = config_of(
        "", PRONK_MODEL="m", PRONK_PORT="1", PRONK_API_KEY="a, b", PRONK_DTYPE="float32", PRONK_BLOCK_SIZE="32",
        PRONK_NO_ENABLE_PREFIX_CACHING="true",
    )  # fmt: skip
    assert by_flags == by_variables


def test_a_flag_wins_over_its_variable_and_a_variable_over_the_default() -> None:
    assert config_of("other --port 1", PRONK_PORT="2", PRONK_MODEL="m").port == 1
    assert config_of("other", PRONK_MODEL="m").engine.model == "other"
    assert config_of("", PRONK_PORT="2").port == 2
    assert config_of("", PRONK_PORT="").port == 8000
    assert config_of("--port 1", PRONK_PORT="nonsense").port == 1
    assert config_of("", PRONK_NO_ENABLE_PREFIX_CACHING="0").engine.cache.enable_prefix_caching
    assert not config_of(
        "--no-enable-prefix-caching", PRONK_NO_ENABLE_PREFIX_CACHING="0"
    ).engine.cache.enable_prefix_caching


MISTAKES = [
    ("serve --max-model-length 5", {}, ["--max-model-length", "did you mean --max-model-len?"]),
    ("serve --frobnicate", {}, ["--frobnicate", "pronk serve --help"]),
    ("serve --max-model 5", {}, ["--max-model"]),  # no abbreviations: they would break when a flag is added
    ("serve --port x", {}, ["--port", "'x'", "whole number"]),
    ("serve --port 1.5", {}, ["--port", "whole number"]),
    ("serve --port", {}, ["--port needs a value"]),
    ("serve --port=", {}, ["--port needs a value"]),
    ("serve --port 65536", {}, ["--port 65536"]),
    ("serve --shutdown-timeout nan", {}, ["--shutdown-timeout"]),
    ("serve --api-key a,,b", {}, ["--api-key", "empty key"]),
    ("serve --served-model-name ,", {}, ["--served-model-name"]),
    ("serve --dtype int4", {}, ["--dtype", "bfloat16, float16"]),
    ("serve --log-level loud", {}, ["--log-level", "debug, info"]),
    ("serve --block-size 17", {}, ["--block-size 17", "32"]),
    ("serve --kv-cache-memory much", {}, ["'much'", "4GiB"]),
    ("serve --tensor-parallel-size 0", {}, ["--tensor-parallel-size 0"]),
    ("serve a b", {}, ["'b'"]),
    ("serv", {}, ["'serv'", "pronk --help"]),
    ("--frobnicate", {}, ["--frobnicate"]),
    ("serve", {"PRONK_PORT": "x"}, ["PRONK_PORT", "'x'"]),
    ("serve", {"PRONK_DTYPE": "int4"}, ["PRONK_DTYPE"]),
    ("serve", {"PRONK_BLOCK_SIZE": "17"}, ["PRONK_BLOCK_SIZE 17"]),
    ("serve", {"PRONK_MAX_NUM_SEQS": "0"}, ["PRONK_MAX_NUM_SEQS 0"]),
    ("serve", {"PRONK_NO_ENABLE_PREFIX_CACHING": "maybe"}, ["PRONK_NO_ENABLE_PREFIX_CACHING", "1 or 0"]),
    ("serve --port 0 --block-size 17", {"PRONK_PORT": "1"}, ["--block-size 17"]),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "environment", "words"), MISTAKES, ids=[mistake[0] for mistake in MISTAKES])
def test_a_mistake_is_one_sentence(
    arguments: str, environment: dict[str, str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments.split(), environment) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("pronk: ")
    assert output.err.count("\n") == 1
    for word in words:
        assert word in output.err


def test_the_variable_is_named_only_where_it_is_at_fault() -> None:
    with pytest.raises(ConfigError, match="--block-size 17"):
        assemble(ServerConfig, OPTIONS, {"engine.cache.block_size": "17"}, {"PRONK_BLOCK_SIZE": "16"})


def test_unknown_variables_are_told_and_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    config_of("", PRONK_MAX_MODEL_LENGTH="5", HOME="/")
    error = capsys.readouterr().err
    assert "PRONK_MAX_MODEL_LENGTH means nothing" in error
    assert "did you mean PRONK_MAX_MODEL_LEN?" in error
    assert "HOME" not in error


def test_what_kubernetes_sets_is_not_taken_for_ours(capsys: pytest.CaptureFixture[str]) -> None:
    """A service of the name pronk gives every container of its namespace PRONK_PORT and more."""
    links = {
        "PRONK_PORT": "tcp://10.0.0.7:80",
        "PRONK_SERVICE_HOST": "10.0.0.7",
        "PRONK_PORT_80_TCP_ADDR": "10.0.0.7",
    }
    assert config_of("", **links).port == 8000
    assert len(list(warnings_about(links, OPTIONS))) == 1
    assert "enableServiceLinks: false" in capsys.readouterr().err


TORCHRUN = {
    "RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
}  # fmt: skip


def test_rank_0_of_torchrun_serves_and_knows_its_position() -> None:
    config = config_of("--tensor-parallel-size 4 --port 9", **TORCHRUN)
    position = config.engine.position
    assert position is not None
    assert (position.rank, position.size, position.neighbours, position.port) == (0, 4, 2, 29500)
    assert config.port == 9
    alone = {**TORCHRUN, "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    assert config_of("", **alone) == ServerConfig()


def test_another_rank_of_torchrun_follows_and_serves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    followed: list[tuple[object, int]] = []

    def follow(config: EngineConfig, position: Position) -> int:
        followed.append((config.step_timeout, position.rank))
        return 7

    monkeypatch.setattr("pronk.engine.follower.follow_rank_0", follow)
    environment = {**TORCHRUN, "RANK": "3", "LOCAL_RANK": "1"}
    assert cli.main(["serve", "--tensor-parallel-size", "4", "--step-timeout", "9"], environment) == 7
    assert followed == [(9.0, 3)]


@pytest.mark.parametrize("rank", ["0", "3"])
@pytest.mark.parametrize("flags", ["", "--tensor-parallel-size 2"])
def test_torchrun_and_the_flag_must_agree(flags: str, rank: str, capsys: pytest.CaptureFixture[str]) -> None:
    environment = {**TORCHRUN, "RANK": rank, "LOCAL_RANK": str(int(rank) % 2)}
    assert cli.main(["serve", *flags.split()], environment) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "torchrun has started 4 processes; write --tensor-parallel-size 4" in error


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"RANK": "one"}, "RANK 'one'"),
        ({"LOCAL_WORLD_SIZE": "3"}, "the same --nproc-per-node on each host"),
        ({"RANK": "2", "LOCAL_RANK": "1"}, "the same --nproc-per-node on each host"),
        ({"LOCAL_WORLD_SIZE": "0"}, "the same --nproc-per-node on each host"),
    ],
)
def test_what_torchrun_cannot_have_said_is_one_sentence(
    changes: dict[str, str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", "--tensor-parallel-size", "4"], {**TORCHRUN, **changes}) == 2
    assert words in capsys.readouterr().err


def test_a_few_of_torchruns_variables_mean_nothing() -> None:
    del (environment := dict(TORCHRUN))["LOCAL_RANK"]
    assert config_of("", **environment) == ServerConfig()


def test_the_package_is_the_command() -> None:
    command = [sys.executable, "-m", "pronk", "--version"]
    assert subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.startswith("pronk 0.")


def test_names_of_models(tmp_path: Path) -> None:
    folder = tmp_path / "Llama-3.2-1B-Instruct"
    folder.mkdir()
    assert config_of("").model_names == ("cria",)
    assert config_of("meta-llama/Llama-3.2-1B").model_names == ("meta-llama/Llama-3.2-1B",)
    assert config_of(f"{folder}").model_names == config_of(f"{folder}/").model_names == ("Llama-3.2-1B-Instruct",)
    assert config_of(f"{folder} --served-model-name a,b").model_names == ("a", "b")


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["serve", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments, {})
        assert caught.value.code == 0
    output = capsys.readouterr().out
    assert "pronk 0." in output
    for option in OPTIONS:
        assert option.flag in output
        assert option.variable in output
    assert "PRONK_MODEL" in output
    assert cli.main([], {}) == 2


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60).stdout


def test_the_servers_process_never_imports_torch() -> None:
    code = (
        "import sys, pronk.server.cli, pronk.server.app, pronk.server.lifecycle; "
        "print([name for name in ('torch', 'transformers', 'numpy', 'huggingface_hub') if name in sys.modules])"
    )
    assert run(code).strip() == "[]"


def test_a_wrong_flag_is_told_before_the_server_is_imported() -> None:
    code = (
        "import sys; from pronk.server import cli; code = cli.main(['serve', '--nope'], {}); "
        "print(code, [name for name in ('fastapi', 'uvicorn', 'pydantic', 'torch') if name in sys.modules])"
    )
    assert run(code).strip() == "2 []"
