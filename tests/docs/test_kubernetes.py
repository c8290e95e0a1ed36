"""The manifest for several hosts: does it parse, and name only what torchrun and the server have?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from pronk.server.config import ServerConfig
from pronk.server.options import options_of

MANIFEST = Path(__file__).parents[2] / "docker/kubernetes/leaderworkerset.yaml"
GROUP, SERVICE = yaml.safe_load_all(MANIFEST.read_text())
TEMPLATE = GROUP["spec"]["leaderWorkerTemplate"]
ROLES = ["leaderTemplate", "workerTemplate"]
LWS = {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "pronk-0.pronk.default"}


def container(role: str) -> dict[str, Any]:
    (only,) = TEMPLATE[role]["spec"]["containers"]
    found: dict[str, Any] = only
    return found


def command(role: str) -> list[str]:
    """With the variables that the controller sets."""
    words: list[str] = container(role)["command"]
    for name, value in LWS.items():
        words = [word.replace(f"$({name})", value) for word in words]
    assert not any("$" in word for word in words)
    return words


def flags_of_pronk(role: str) -> dict[str, str]:
    words = command(role)
    flags = words[words.index("serve") + 2 :]
    assert all(flag.startswith("--") for flag in flags)
    return dict(flag.split("=", 1) for flag in flags)


def test_a_group_is_started_again_as_a_whole() -> None:
    assert GROUP["kind"] == "LeaderWorkerSet"
    assert TEMPLATE["restartPolicy"] == "RecreateGroupOnPodRestart"


@pytest.mark.parametrize("role", ROLES)
def test_torchrun_understands_its_flags_and_starts_the_server(role: str) -> None:
    words = command(role)
    assert words[:3] == ["python", "-m", "torch.distributed.run"]
    told = get_args_parser().parse_args(words[3:])
    assert (told.nnodes, told.node_rank, told.master_addr) == ("2", 1, LWS["LWS_LEADER_ADDRESS"])
    assert (told.module, told.training_script, told.training_script_args[0]) == (True, "pronk", "serve")
    assert int(told.max_restarts) == 0


@pytest.mark.parametrize("role", ROLES)
def test_the_server_has_the_flags(role: str) -> None:
    assert flags_of_pronk(role).keys() <= {option.flag for option in options_of(ServerConfig)}


@pytest.mark.parametrize("role", ROLES)
def test_there_is_a_gpu_for_each_rank(role: str) -> None:
    told = get_args_parser().parse_args(command(role)[3:])
    assert int(container(role)["resources"]["limits"]["nvidia.com/gpu"]) == int(told.nproc_per_node)
    assert int(flags_of_pronk(role)["--tensor-parallel-size"]) == TEMPLATE["size"] * int(told.nproc_per_node)


@pytest.mark.parametrize("role", ROLES)
def test_a_stop_leaves_time_to_drain(role: str) -> None:
    told = get_args_parser().parse_args(command(role)[3:])
    grace = TEMPLATE[role]["spec"]["terminationGracePeriodSeconds"]
    assert grace > told.shutdown_timeout > ServerConfig().shutdown_timeout


def test_only_the_leader_is_asked() -> None:
    leader, follower = (container(role) for role in ROLES)
    assert leader["readinessProbe"]["httpGet"] == {"path": "/health", "port": "http"}
    assert "ports" not in follower
    assert not any("Probe" in name for name in follower)
    labels = TEMPLATE["leaderTemplate"]["metadata"]["labels"]
    assert SERVICE["spec"]["selector"] == labels
    assert SERVICE["metadata"]["name"] != GROUP["metadata"]["name"], "the controller makes one of that name"
    assert TEMPLATE["workerTemplate"]["metadata"]["labels"] != labels


def test_the_checkpoint_lies_at_the_same_path_on_each_host() -> None:
    leader, follower = (container(role) for role in ROLES)
    assert leader["volumeMounts"] == follower["volumeMounts"]
    assert leader["command"] == follower["command"]
    (mount,) = [mount for mount in leader["volumeMounts"] if mount["name"] == "checkpoints"]
    assert command("leaderTemplate")[-2].startswith(mount["mountPath"] + "/")


@pytest.mark.parametrize("role", ROLES)
def test_no_service_is_taken_for_a_flag(role: str) -> None:
    assert TEMPLATE[role]["spec"]["enableServiceLinks"] is False
