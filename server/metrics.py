"""/metrics: what is counted, under which name, in which buckets. The registry is passed in; nothing here is global.

Counters and gauges of the engine are read from its newest statistics when they are scraped, so they cannot drift from
it. Every metric has the label `model`; none has a user, a key, a request id or a text in a label.
"""

from __future__ import annotations

import platform
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from pronk.engine.wire import EngineInfo, EngineStats, Step
from pronk.server.record import RequestRecord
from pronk.server.service import Engine, Phase, Service

PREFIX = "pronk_"
OUTCOMES = ("stop", "length", "client_abort", "error")
REJECTIONS = ("loading", "draining", "engine_down", "queue_full", "body_too_large", "context_length", "invalid", "auth")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

# Supersets of the boundaries that OpenTelemetry's conventions for generative AI recommend.
# fmt: off
TIME_TO_FIRST_TOKEN = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.35, 0.5, 0.75,
    1.0, 1.5, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
)
INTER_TOKEN_LATENCY = (
    0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05,
    0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0,
)
# fmt: on
DURATION = tuple(round(0.01 * 2**n, 2) for n in range(18))
STAGE = tuple(0.0005 * 2**n for n in range(22))
SHORT = tuple(0.0001 * 2**n for n in range(18))
POWERS = tuple(float(2**n) for n in range(15))
TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))


class Metrics:
    """All metrics of one server."""

    def __init__(self, registry: CollectorRegistry, service: Service) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry
        self._service = service
        self._model = service.names[0]
        self._http_requests = self._counter(
            "http_requests", "HTTP requests answered, by route, method and status.", "route", "method", "code"
        )
        self._http_durations = self._histogram(
            "http_request_duration_seconds", "Seconds from a request's arrival to its end.", DURATION, "route"
        )
        self._define_request_metrics()
        self._define_step_metrics()
        registry.register(_EngineState(service))
        # No namespace: process_resident_memory_bytes and its kin are names that dashboards know.
        ProcessCollector(registry=registry)

    def _define_request_metrics(self) -> None:
        outcomes = self._counter("requests", "Requests that the engine took, by how they ended.", "outcome")
        self._outcomes = {name: outcomes.labels(self._model, name) for name in OUTCOMES}
        rejections = self._counter("request_rejections", "Requests that were refused, by reason.", "reason")
        self._rejections = {name: rejections.labels(self._model, name) for name in REJECTIONS}
        self._dropped = self._counter(
            "slow_clients_dropped", "Connections that were closed because their client read nothing."
        ).labels(self._model)
        durations = self._histogram(
            "request_duration_seconds",
            "Seconds from arrival to the end, of requests the engine took.",
            DURATION,
            "outcome",
        )
        self._durations = {name: durations.labels(self._model, name) for name in OUTCOMES}
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "Seconds from arrival to the first token.", TIME_TO_FIRST_TOKEN
        ).labels(self._model)
        self._per_token = self._histogram(
            "time_per_output_token_seconds", "Seconds between tokens, a request's average.", INTER_TOKEN_LATENCY
        ).labels(self._model)
        self._prompt_tokens = self._histogram("request_prompt_tokens", "Tokens of a request's prompt.", TOKENS).labels(
            self._model
        )
        self._generated_tokens = self._histogram(
            "request_generated_tokens", "Tokens of a request's answer.", TOKENS
        ).labels(self._model)
        self._render = self._histogram(
            "tokenize_duration_seconds", "Seconds to turn messages into tokens.", SHORT
        ).labels(self._model)
        self._stages = {
            "queue": self._histogram(
                "queue_duration_seconds", "Seconds in the engine before the first token was scheduled.", STAGE
            ).labels(self._model),
            "prefill": self._histogram(
                "prefill_duration_seconds", "Seconds from then until the first token was sampled.", STAGE
            ).labels(self._model),
            "decode": self._histogram(
                "decode_duration_seconds", "Seconds from the first token to the last.", STAGE
            ).labels(self._model),
        }

    def _define_step_metrics(self) -> None:
        self._token_gaps = BucketCounts(
            PREFIX + "inter_token_latency_seconds",
            "Seconds from one token of a request to its next.",
            INTER_TOKEN_LATENCY,
            {"model": self._model},
        )
        self._registry.register(self._token_gaps)
        self._last_step = Gauge(
            PREFIX + "engine_last_step_timestamp_seconds",
            "When the engine last made a step, in seconds since 1970; 0 before its first.",
            ("model",),
            registry=self._registry,
        ).labels(self._model)
        self._step_durations = self._histogram(
            "engine_step_duration_seconds", "Seconds of one step of the engine.", SHORT
        ).labels(self._model)
        self._step_tokens = self._histogram(
            "engine_step_tokens", "Tokens computed in one step, prompts and answers together.", POWERS
        ).labels(self._model)
        self._step_sequences = self._histogram(
            "engine_batch_size", "Sequences that took part in one step.", POWERS
        ).labels(self._model)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, ("model", *labels), registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(PREFIX + name, text, ("model", *labels), registry=self._registry, buckets=buckets)

    def watch(self, engine: Engine) -> None:
        """Count the engine's steps from now on."""
        clock = TokenClock(self._token_gaps)
        restarts = engine.restarts

        def on_step(step: Step) -> None:
            nonlocal restarts
            if engine.restarts != restarts:
                restarts = engine.restarts
                clock.forget()  # what ran before has ended without a last step
            self._last_step.set_to_current_time()
            clock.tick(step, time.perf_counter())
            if step.stats.step_sequences:
                self._step_durations.observe(step.stats.step_seconds)
                self._step_tokens.observe(step.stats.step_tokens)
                self._step_sequences.observe(step.stats.step_sequences)

        engine.add_stats_listener(on_step)

    def ended(self, record: RequestRecord, *, route: str, method: str) -> None:
        """One HTTP request has ended. route: a route's template, never a path that a client made up."""
        seconds = time.perf_counter() - record.arrived
        method = method if method in METHODS else "other"
        self._http_requests.labels(self._model, route, method, str(record.status)).inc()
        self._http_durations.labels(self._model, route).observe(seconds)
        if record.rejection:
            self._rejections[record.rejection].inc()
        if record.render_seconds is not None:
            self._render.observe(record.render_seconds)
        if record.outcome is not None:
            self._outcomes[record.outcome].inc()
            self._durations[record.outcome].observe(seconds)
            self._observe_completion(record)

    def client_dropped(self) -> None:
        """A connection was closed because its client read nothing of what was waiting for it."""
        self._dropped.inc()

    def _observe_completion(self, record: RequestRecord) -> None:
        self._prompt_tokens.observe(record.prompt_tokens)
        self._generated_tokens.observe(record.completion_tokens)
        if record.time_to_first_token is not None:
            self._first_token.observe(record.time_to_first_token)
        if record.time_per_output_token is not None:
            self._per_token.observe(record.time_per_output_token)
        if record.timing is not None:
            for name, histogram in self._stages.items():
                histogram.observe(getattr(record.timing, name))

    def expose(self) -> bytes:
        """-> Prometheus' text format 0.0.4."""
        return generate_latest(self._registry)


class BucketCounts(Collector):
    """A histogram that takes n equal values at the price of one."""

    def __init__(self, name: str, text: str, buckets: Sequence[float], labels: Mapping[str, str]) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._bounds = tuple(buckets)
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def add(self, value: float, times: int) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=list(self._labels))
        total = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else str(bound), total))
        family.add_metric(list(self._labels.values()), buckets, sum_value=self._sum)
        yield family


class TokenClock:
    """Steps -> gaps between the tokens of each request.

    Requests that had their last token in the same step share one entry of the histogram's work: a step of 128 streams
    costs about as much as a step of one.
    """

    def __init__(self, gaps: BucketCounts) -> None:
        self._gaps = gaps
        self._last: dict[str, float] = {}

    def tick(self, step: Step, now: float) -> None:
        """now: seconds, of any clock that only goes forward."""
        times_of: dict[float, int] = {}
        ends = self._last
        for output in step.outputs:
            request_id, tokens = output.request_id, len(output.token_ids)
            last = ends.get(request_id)
            if tokens and last is not None:
                gap = (now - last) / tokens
                times_of[gap] = times_of.get(gap, 0) + tokens
            elif tokens > 1:
                times_of[0.0] = times_of.get(0.0, 0) + tokens - 1
            if output.finish_reason is not None:
                ends.pop(request_id, None)
            elif tokens:
                ends[request_id] = now
        for gap, times in times_of.items():
            self._gaps.add(gap, times)

    def forget(self) -> None:
        """None of the requests runs any more."""
        self._last.clear()


class _EngineState(Collector):
    """Reads the service and the engine's newest statistics at each scrape."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._build = {
            "version": _version("pronk"),
            "torch": _version("torch"),
            "python": platform.python_version(),
        }

    def collect(self) -> Iterator[Metric]:
        phase = self._service.phase
        yield self._gauge("ready", "1 when requests are taken and answered.", phase is Phase.READY)
        yield self._gauge(
            "draining", "1 when the server finishes what runs and takes nothing new.", phase is Phase.DRAINING
        )
        build = GaugeMetricFamily(PREFIX + "build_info", "What runs; always 1.", labels=["model", *self._build])
        build.add_metric([self._service.names[0], *self._build.values()], 1)
        yield build
        model = self._service.model
        yield self._gauge(
            "engine_up", "1 when the engine's process runs.", model is not None and model.engine.error is None
        )
        if model is not None:
            yield from self._group(model.engine)
            yield from self._memory(model.engine.info)
            yield from self._gauges(model.engine.stats)
            yield from self._counters(model.engine.stats)

    def _group(self, engine: Engine) -> Iterator[Metric]:
        family = CounterMetricFamily(
            PREFIX + "engine_restarts",
            "Times that the engine died or hung and came up again; its own counters begin anew then.",
            labels=["model"],
        )
        family.add_metric([self._service.names[0]], engine.restarts)
        yield family
        up = GaugeMetricFamily(
            PREFIX + "rank_up",
            "1 when this one of the processes that share the model runs and can be asked.",
            labels=["model", "rank"],
        )
        for rank in range(engine.num_ranks):
            up.add_metric([self._service.names[0], str(rank)], float(engine.error is None))
        yield up

    def _memory(self, info: EngineInfo) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            PREFIX + "device_memory_bytes",
            "Memory that the engine takes, by use: its weights, its KV cache when all of it is written, and, if known, "
            "what its processes need to run.",
            labels=["model", "device", "kind"],
        )
        sizes = {"weights": info.weights_bytes, "kv_cache": info.kv_cache_bytes, "runtime": info.runtime_bytes}
        for kind, size in sizes.items():
            if size is not None:
                family.add_metric([self._service.names[0], info.device, kind], size)
        yield family

    def _gauges(self, stats: EngineStats) -> Iterator[Metric]:
        yield self._gauge("requests_running", "Requests that take part in the engine's steps.", stats.num_running)
        yield self._gauge("requests_waiting", "Requests that wait for their first step.", stats.num_waiting)
        free = stats.blocks_total - stats.blocks_used - stats.blocks_cached
        yield self._by_state(
            GaugeMetricFamily(
                PREFIX + "kv_pages",
                "Pages (blocks) of the KV cache: used by running requests, cached for a later prefix, or free.",
                labels=["model", "state"],
            ),
            {"used": stats.blocks_used, "cached": stats.blocks_cached, "free": free},
        )
        usage = stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0
        yield self._gauge("kv_cache_usage_ratio", "Share of the KV cache that running requests use, 0 to 1.", usage)

    def _counters(self, stats: EngineStats) -> Iterator[Metric]:
        yield self._by_state(
            CounterMetricFamily(
                PREFIX + "prompt_tokens",
                "Prompt tokens, computed or found in the prefix cache.",
                labels=["model", "source"],
            ),
            {"computed": stats.prompt_tokens_computed, "cached": stats.prompt_tokens_cached},
        )
        for name, text, value in (
            ("generated_tokens", "Tokens generated.", stats.generated_tokens),
            ("engine_steps", "Steps of the engine.", stats.steps),
            ("preemptions", "Requests put back to waiting because the KV cache was full.", stats.preemptions),
            ("prefix_cache_query_tokens", "Prompt tokens looked up in the prefix cache.", stats.prefix_query_tokens),
            ("prefix_cache_hit_tokens", "Prompt tokens found there.", stats.prefix_hit_tokens),
            (
                "prefix_cache_evicted_pages",
                "Pages (blocks) whose prefix made room for others.",
                stats.prefix_evicted_blocks,
            ),
            (
                "nonfinite_logits",
                "Requests that failed because the model produced NaN or infinity.",
                stats.nonfinite_logits,
            ),
        ):
            family = CounterMetricFamily(PREFIX + name, text, labels=["model"])
            family.add_metric([self._service.names[0]], value)
            yield family
        yield from self._collectives(stats)

    def _collectives(self, stats: EngineStats) -> Iterator[Metric]:
        yield self._by_state(
            CounterMetricFamily(
                PREFIX + "collectives",
                "Operations by which the processes that share the model exchange what each has worked out.",
                labels=["model", "operation"],
            ),
            {"all_reduce": stats.all_reduces, "all_gather": stats.all_gathers},
        )
        family = CounterMetricFamily(
            PREFIX + "collective_seconds",
            "Seconds that rank 0 spent in them, waiting for the others included; on a GPU, launching them.",
            labels=["model"],
        )
        family.add_metric([self._service.names[0]], stats.collective_seconds)
        yield family

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(PREFIX + name, text, labels=["model"])
        family.add_metric([self._service.names[0]], float(value))
        return family

    def _by_state(
        self, family: GaugeMetricFamily | CounterMetricFamily, values: Mapping[str, float]
    ) -> GaugeMetricFamily | CounterMetricFamily:
        for state, value in values.items():
            family.add_metric([self._service.names[0], state], value)
        return family


def _version(distribution: str) -> str:
    """Read from the package's metadata: the server's process never imports torch."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""
