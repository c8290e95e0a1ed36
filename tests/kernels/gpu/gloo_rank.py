"""One rank of a model that is shared over gloo, on the GPU's kernels in Triton's interpreter or on the definitions.

    python gloo_rank.py KERNELS RANK SIZE PORT FOLDER

A process of its own: two threads cannot interpret kernels at once. Rank 0 prints what it generated, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pronk.kernels import interpreter

if __name__ == "__main__":
    interpreter.install()

from pronk.engine import runner as runners
from pronk.engine.company import SeveralHosts
from pronk.engine.config import EngineConfig, replace
from pronk.engine.core import EngineCore
from pronk.engine.leading import Leading
from pronk.engine.orders import Stop, decode
from pronk.engine.request import Request, SamplingParams
from pronk.engine.tokenizer import load_vocabulary
from pronk.engine.torchrun import Position
from pronk.engine.worker import join_group
from pronk.kernels import gpu, reference

SECONDS = 120.0


def main(kernels: str, rank: int, size: int, port: int, folder: Path) -> None:
    chosen = {"gpu": gpu, "reference": reference}[kernels]
    runners.for_device = lambda device, **options: chosen  # type: ignore[assignment]
    position = Position(rank=rank, size=size, neighbours=size, host="127.0.0.1", port=port, has_store=False)
    company = SeveralHosts(position, SECONDS)
    config = replace(
        EngineConfig(model=str(folder), device="cpu", max_model_len=200, step_timeout=SECONDS),
        memory="4MiB",
        max_num_seqs=4,
        max_num_batched_tokens=24,
    )
    if rank:
        orders = company.follow()
        tp = join_group(company, config, beat=do_nothing, on_begin=do_nothing)
        runner = runners.load_runner(config, folder, lambda done, total: None, tp=tp)
        last = None
        while True:
            message = orders.receive(SECONDS)
            if message is None or isinstance(order := decode(message), Stop):
                return
            last = runner.carry_out(order, last)
    leading = Leading(company.lead())
    tp = join_group(company, config, beat=leading.keep, on_begin=do_nothing)
    runner = runners.load_runner(config, folder, lambda done, total: None, tp=tp, tell=leading.tell)
    print(json.dumps(generate(EngineCore(config, runner, load_vocabulary(folder)))))
    leading.tell(Stop())


def do_nothing() -> None:
    pass


def generate(core: EngineCore) -> dict[str, list[int]]:
    """Greedily, requests of several lengths together."""
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    for number, length in enumerate((3, 30, 11)):
        prompt = [(7 * place + number) % 200 for place in range(length)]
        core.add(Request(request_id=str(number), prompt=prompt, params=params))
    found: dict[str, list[int]] = {}
    while core.has_work:
        for output in core.step():
            found.setdefault(output.request_id, []).extend(output.token_ids)
    return found


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]), Path(sys.argv[5]))  # type: ignore[arg-type]
