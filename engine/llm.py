"""LLM: the engine without a server or a second process, for scripts and tests. Same core, same answers."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from pathlib import Path

from pronk.engine.client import check_request
from pronk.engine.config import EngineConfig
from pronk.engine.core import EngineCore
from pronk.engine.errors import ConfigError, NonFiniteLogitsError
from pronk.engine.process import engine_info
from pronk.engine.request import FinishReason, Output, Request, SamplingParams, TokenLogprobs
from pronk.engine.runner import load_runner
from pronk.engine.tokenizer import load_vocabulary


@dataclass
class Completion:
    """One request's whole answer."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_cached_tokens: int = 0

    def add(self, output: Output) -> None:
        """What one more step gave."""
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs or []
        self.finish_reason = output.finish_reason
        self.stop_reason = output.stop_reason
        self.num_cached_tokens = output.num_cached_tokens


class LLM:
    """A loaded model that answers batches of token ids."""

    def __init__(self, config: EngineConfig) -> None:
        """config.model: a folder with a checkpoint. Raises CheckpointError and ConfigError."""
        if config.tensor_parallel_size > 1:
            raise ConfigError(
                f"tensor_parallel_size {config.tensor_parallel_size}: LLM runs a model in its own process, which is "
                "one rank; start `pronk serve` with --tensor-parallel-size and ask that, or leave it at 1"
            )
        folder = Path(config.model)
        runner = load_runner(config, folder, lambda done, total: None)
        self.core = EngineCore(config, runner, load_vocabulary(folder))
        self.info = engine_info(config, runner)

    def generate(
        self, prompts: Many[Many[int]], params: SamplingParams | Many[SamplingParams] | None = None
    ) -> list[Completion]:
        """prompts: token ids; params: one for all, or one for each. -> a completion for each prompt, in order.

        Raises RequestError before anything runs, NonFiniteLogitsError when the model gives no numbers.
        """
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        requests = [
            Request(request_id=str(i), prompt=list(prompt), params=each)
            for i, (prompt, each) in enumerate(zip(prompts, params, strict=True))
        ]
        for request in requests:
            check_request(request, self.info)
        completions = {request.request_id: Completion([], []) for request in requests}
        for request in requests:
            self.core.add(request)
        while self.core.has_work:
            for output in self.core.step():
                if output.finish_reason == "error":
                    raise NonFiniteLogitsError(output.error or "the request failed")
                completions[output.request_id].add(output)
        return list(completions.values())
