"""The files an operator starts from: do they parse, agree with one another, and name only what the server has?"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from pronk.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from pronk.engine.wire import EngineInfo, EngineStats
from pronk.kernels.jit import compiler
from pronk.server.config import ServerConfig
from pronk.server.metrics import Metrics
from pronk.server.service import Phase

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
DASHBOARD = json.loads((DOCKER / "grafana/dashboards/pronk.json").read_text())
LOOPBACK = "127.0.0.1"


def dockerfile() -> list[tuple[str, str]]:
    """-> (instruction, its arguments), continuation lines joined, comments dropped."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", "", "\n".join(lines))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def last_stage(instruction: str) -> list[str]:
    steps = dockerfile()
    start = max(i for i, (name, _) in enumerate(steps) if name == "FROM")
    return [arguments for name, arguments in steps[start:] if name == instruction]


def load_check_dashboard() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_dashboard", DOCKER / "check_dashboard.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


check_dashboard = load_check_dashboard()
QUERIES = list(check_dashboard.queries(DASHBOARD))


def seconds(duration: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(s|m)", duration).groups()  # type: ignore[union-attr]
    return float(number) * {"s": 1, "m": 60}[unit]


# The image


@pytest.mark.parametrize("instruction", ["ENTRYPOINT", "CMD"])
def test_what_the_image_runs_is_in_exec_form_so_that_a_signal_reaches_it(instruction: str) -> None:
    assert all(isinstance(json.loads(arguments), list) for arguments in last_stage(instruction))
    assert last_stage(instruction)


def test_the_image_starts_the_server_that_pyproject_installs() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert json.loads(last_stage("ENTRYPOINT")[0])[0] in scripts
    assert json.loads(last_stage("CMD")[0]) == ["serve"]


def test_the_image_runs_as_a_numbered_user_that_is_not_root() -> None:
    user, group = last_stage("USER")[-1].split(":")
    assert int(user) >= 10000
    assert int(group) >= 10000


def test_the_image_stops_by_the_signal_that_drains() -> None:
    assert last_stage("STOPSIGNAL") == ["SIGTERM"]


class _Health(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        del format, args


@pytest.fixture
def serve() -> Iterator[Any]:
    """serve(handler class) -> the port it answers on."""
    servers = []

    def start(handler: type[BaseHTTPRequestHandler]) -> int:
        server = HTTPServer((LOOPBACK, 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        return int(server.server_port)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def run_healthcheck(port: int) -> int:
    flags, command = last_stage("HEALTHCHECK")[0].split("CMD", 1)
    assert "--start-period" in flags
    words = json.loads(command)
    assert words[0] == "python"
    environment = {"PRONK_PORT": str(port), "http_proxy": f"http://{LOOPBACK}:1"}
    result = subprocess.run([sys.executable, *words[1:]], env=environment, capture_output=True, timeout=20, check=False)
    return result.returncode


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_health_check_asks_health_on_the_port_of_the_environment(serve: Any, status: int, code: int) -> None:
    port = serve(type("Handler", (_Health,), {"status": status}))
    assert run_healthcheck(port) == code


def test_the_health_check_fails_where_nobody_listens() -> None:
    assert run_healthcheck(1) != 0


def test_the_image_sets_only_variables_that_the_server_reads() -> None:
    names = set(re.findall(r"\b(PRONK_\w+)=", " ".join(last_stage("ENV"))))
    assert names == {"PRONK_HOST", "PRONK_PORT", compiler.CACHE_VARIABLE}
    assert names - {compiler.CACHE_VARIABLE} <= variables()


def test_no_instruction_of_the_image_holds_a_secret_or_an_address_that_is_not_public() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert set(re.findall(r"https?://([\w.-]+)", text)) <= {"download.pytorch.org", "pypi.org", "127.0.0.1"}
    assert not re.search(r"(?i)token=|password|secret", text)


def test_all_that_the_wheel_is_built_from_is_let_into_the_build() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    let_in = {line[1:] for line in lines if line.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    needed += [project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml"]
    assert {path.split("/")[0] for path in needed} == let_in


# Compose


def variables() -> set[str]:
    """The environment variables that the configuration's fields are read from, and the model's."""
    flags = {
        field.metadata["flag"]
        for config in (ServerConfig, EngineConfig, CacheConfig, SchedulerConfig)
        for field in dataclasses.fields(config)
        if "flag" in field.metadata
    }
    return {"PRONK_" + flag.removeprefix("--").replace("-", "_").upper() for flag in flags} | {"PRONK_MODEL"}


SERVICES = sorted(COMPOSE["services"])


def test_compose_has_the_server_and_what_watches_it() -> None:
    assert SERVICES == ["grafana", "prometheus", "server"]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_bounded_and_reached_from_this_machine_only(name: str) -> None:
    service = COMPOSE["services"][name]
    assert all(port.startswith(f"{LOOPBACK}:") for port in service["ports"])
    assert service["mem_limit"]
    assert seconds(service["stop_grace_period"]) > 0


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_waits_for_the_health_of_what_it_needs(name: str) -> None:
    for needed, how in COMPOSE["services"][name].get("depends_on", {}).items():
        assert how == {"condition": "service_healthy"}
        assert needed == "server" or "healthcheck" in COMPOSE["services"][needed]
    assert name == "server" or COMPOSE["services"][name]["depends_on"]


@pytest.mark.parametrize("name", SERVICES)
def test_the_mounts_of_a_service_exist_and_images_are_pinned(name: str) -> None:
    service = COMPOSE["services"][name]
    for mount in service["volumes"]:
        source = mount.split(":")[0]
        assert source in COMPOSE["volumes"] or (DOCKER / source).exists()
        assert source in COMPOSE["volumes"] or mount.endswith(":ro")
    assert "build" in service or re.search(r":v?\d+\.\d+\.\d+$", service["image"])


def test_the_server_in_compose_is_confined() -> None:
    server = COMPOSE["services"]["server"]
    assert server["read_only"] is True
    assert server["cap_drop"] == ["ALL"]
    assert server["security_opt"] == ["no-new-privileges"]
    assert (DOCKER / server["build"]["context"] / "Dockerfile").samefile(ROOT / "Dockerfile")
    assert "privileged" not in server


def test_a_stop_of_the_server_in_compose_leaves_time_to_drain() -> None:
    grace = seconds(COMPOSE["services"]["server"]["stop_grace_period"])
    assert grace > ServerConfig().shutdown_timeout


def test_compose_passes_on_only_variables_that_someone_reads() -> None:
    passed = set(COMPOSE["services"]["server"]["environment"])
    assert passed - variables() == {"HF_TOKEN"}
    assert not any("=" in name for name in passed), "a value here would be the same for everyone, or a secret"


# Prometheus and Grafana's provisioning


def test_prometheus_scrapes_the_server_where_the_image_listens() -> None:
    (job,) = yaml.safe_load((DOCKER / "prometheus.yml").read_text())["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    host, port = target.split(":")
    assert host in COMPOSE["services"]
    assert f"PRONK_PORT={port}" in " ".join(last_stage("ENV"))
    assert job.get("metrics_path", "/metrics") == "/metrics"


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    (source,) = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    address = urlsplit(source["url"])
    assert address.hostname in COMPOSE["services"]
    assert f"{LOOPBACK}:{address.port}:{address.port}" in COMPOSE["services"][address.hostname]["ports"]
    (provider,) = yaml.safe_load((DOCKER / "grafana/provisioning/dashboards/pronk.yaml").read_text())["providers"]
    grafana = COMPOSE["services"]["grafana"]
    mounts = dict(mount.removesuffix(":ro").split(":") for mount in grafana["volumes"])
    (folder,) = [source for source, target in mounts.items() if target == provider["options"]["path"]]
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert home.parent == Path(provider["options"]["path"])
    assert (DOCKER / folder / home.name).is_file()


def test_the_scrape_interval_is_told_to_grafana() -> None:
    (source,) = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    interval = yaml.safe_load((DOCKER / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == interval


# The dashboard


def families() -> Iterator[Metric]:
    """What /metrics exports once a model is loaded."""
    info = EngineInfo(
        folder="cria",
        num_parameters=1,
        dtype="float32",
        device="cpu",
        kernels="reference",
        weights_bytes=1,
        kv_cache_bytes=1,
        num_blocks=1,
        block_size=16,
        max_model_len=1,
        max_num_seqs=1,
        max_num_batched_tokens=1,
        vocab_size=1,
        eos_token_ids=[0],
        load_seconds=0.0,
        ranks=[],
    )
    engine = SimpleNamespace(info=info, stats=EngineStats(blocks_total=1), error=None, restarts=0, num_ranks=1)
    service = SimpleNamespace(names=("cria",), phase=Phase.READY, model=SimpleNamespace(engine=engine))
    registry = CollectorRegistry()
    Metrics(registry, service)  # type: ignore[arg-type]
    yield from registry.collect()


def exported() -> dict[str, bool]:
    """The names of the samples that can appear -> whether they have the label `model`."""
    endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    return {
        family.name + ending: family.name.startswith("pronk_")
        for family in families()
        for ending in endings.get(family.type, ("",))
    }


EXPORTED = exported()


def panels() -> list[dict[str, Any]]:
    return list(check_dashboard.panels(DASHBOARD))


def test_the_dashboard_shows_what_was_promised() -> None:
    titles = " ".join(panel["title"] for panel in panels()).lower()
    for word in ("first token", "inter-token", "latency", "tokens per second", "queue", "kv cache", "outcome"):
        assert word in titles
    for word in ("hit ratio", "preemptions", "errors"):
        assert word in titles


def test_panels_do_not_overlap_and_have_names_of_their_own() -> None:
    everything = DASHBOARD["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    assert len({panel["title"] for panel in everything}) == len(everything)
    cells = [
        (x, y)
        for panel in everything
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) == 23


def test_the_dashboard_is_templated_on_source_model_and_instance() -> None:
    names = [variable["name"] for variable in DASHBOARD["templating"]["list"]]
    assert names == ["datasource", "model", "instance"]
    for panel in panels():
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["description"]


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: f"{query.panel} {query.legend}")
def test_a_query_names_only_metrics_that_the_server_exports(query: Any) -> None:
    names = set(re.findall(r"\b(?:pronk|process)_\w+", query.expr))
    assert names
    assert names <= EXPORTED.keys()


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_the_queries_of_a_panel_select_sum_and_rate_as_they_should(panel: dict[str, Any]) -> None:
    for expr in (target["expr"] for target in panel["targets"]):
        for name, selector in re.findall(r"\b((?:pronk|process)_\w+)\{(.*?)\}", expr):
            assert 'instance=~"$instance"' in selector
            assert ('model=~"$model"' in selector) == EXPORTED[name]
        assert not re.search(r"\b(?:pronk|process)_\w+(?![\w{])", expr), "a metric without a selector"
        assert all(window == "$__rate_interval" for window in re.findall(r"\[(.*?)\]", expr))
        if "histogram_quantile" in expr:
            assert "sum by (le, model) (rate(" in expr
        if "_sum" in expr:
            assert expr.count("_sum{") == expr.count("_count{"), "an average is rate(sum) / rate(count)"
        for name in re.findall(r"\b(pronk_\w+?)(?:_bucket|_sum|_count)?\{", expr):
            assert not name.endswith("_total") or f"rate({name}" in expr


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_a_panel_has_the_unit_of_its_metric(panel: dict[str, Any]) -> None:
    unit = panel["fieldConfig"]["defaults"]["unit"]
    for expr in (target["expr"] for target in panel["targets"]):
        names = re.findall(r"\b((?:pronk|process)_\w+)\{", expr)
        is_ratio = "_ratio{" in expr or (" / " in expr and "_sum{" not in expr)
        is_share_of_time = "_seconds_total{" in expr
        is_time = all(re.search(r"_seconds(_bucket|_sum|_count)?$", name) for name in names)
        is_rate = "rate(" in expr and "_sum{" not in expr
        if is_ratio:
            assert unit == "percentunit"
            assert panel["fieldConfig"]["defaults"]["max"] == 1
        elif is_share_of_time:
            assert unit == "percentunit"
        elif is_time:
            assert unit == "s"
        elif names[0].endswith("_bytes"):
            assert unit == "bytes"
        else:
            assert unit in ({"reqps", "ops", "suffix: tokens/s"} if is_rate else {"short"})


# The tool that asks Prometheus


class _Prometheus(BaseHTTPRequestHandler):
    answers: ClassVar[dict[str, list[str]]] = {}

    def do_GET(self) -> None:
        expr = parse_qs(urlsplit(self.path).query)["query"][0]
        if expr not in self.answers:
            status, body = 400, {"status": "error", "error": f"parse error: {expr}"}
        else:
            result = [{"metric": {}, "value": [0, value]} for value in self.answers[expr]]
            status, body = 200, {"status": "success", "data": {"resultType": "vector", "result": result}}
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, format: str, *args: Any) -> None:
        del format, args


ROW = {"type": "row", "title": "a row", "panels": [{"type": "stat", "title": "b", "targets": [{"expr": "b{$model}"}]}]}
SMALL = {
    "templating": {"list": [{"name": "model", "definition": "label_values(up, model)"}]},
    "panels": [{"type": "timeseries", "title": "a", "targets": [{"expr": "rate(a[$__rate_interval])"}]}, ROW],
}


@pytest.mark.parametrize(
    ("a", "b", "code"),
    [(["1"], ["0", "2"], 0), (["1"], [], 1), (["NaN"], ["1"], 1), (["1", "NaN"], ["1"], 0), (["1"], None, 2)],
)
def test_check_dashboard_finds_every_query_and_says_which_has_no_data(
    serve: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], a: list[str], b: list[str] | None, code: int
) -> None:
    answers = {"up": ["1"], "rate(a[2m])": a} | ({} if b is None else {"b{.*}": b})
    port = serve(type("Handler", (_Prometheus,), {"answers": answers}))
    dashboard = tmp_path / "small.json"
    dashboard.write_text(json.dumps(SMALL))
    arguments = ["--prometheus", f"http://{LOOPBACK}:{port}/", "--dashboard", str(dashboard), "--window", "2m"]
    assert check_dashboard.main(arguments) == code
    out, err = capsys.readouterr()
    assert ("NO DATA" in out) == (code == 1)
    assert ("parse error" in err) == (code == 2)
    assert code == 2 or f"3 queries, {code} without data" in out


# The Makefile


def make(*arguments: str) -> list[list[str]]:
    """-> the commands that `make` would run, as words. Runs none of them."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    # The tests may have been started by a `make` whose own arguments must not reach this one.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("MAKE") and name not in ("ARGS", "MODEL")
    }
    result = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [shlex.split(line, comments=True) for line in result.stdout.splitlines()[-1:]]


def test_make_serve_passes_model_and_flags_on() -> None:
    (words,) = make("serve", "MODEL=./a folder", "ARGS=--port 9000 --seed 1")
    assert words == ["exec", ".venv/bin/pronk", "serve", "./a folder", "--port", "9000", "--seed", "1"]


def test_make_serve_without_a_model_names_none() -> None:
    (words,) = make("serve")
    assert words == ["exec", ".venv/bin/pronk", "serve"]


def test_make_test_passes_arguments_on() -> None:
    (words,) = make("test", "ARGS=tests/docs -x")
    assert words[-3:] == [".venv/bin/pytest", "tests/docs", "-x"]


@pytest.mark.parametrize("target", ["help", "serve", "test", "check", "clean"])
def test_a_target_is_there_and_explained(target: str) -> None:
    text = (ROOT / "Makefile").read_text()
    assert re.search(rf"^{target}:.*## \S", text, re.MULTILINE)
    assert re.search(rf"^\.PHONY:.*\b{target}\b", text, re.MULTILINE)
