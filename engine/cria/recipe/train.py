"""Make cria: learn a tokenizer, train the model on the corpus, write a Hugging Face checkpoint.

    python -m pronk.engine.cria.recipe.train --output engine/cria

The same seed, machine and torch version give the same files. The model card (`engine/cria/README.md`) says how long it
took and how good it is. It knows nothing about serving.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import tiktoken
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from pronk.engine.cria.recipe import bpe, corpus
from pronk.engine.cria.recipe.batches import Batch, copying, talking
from pronk.engine.cria.recipe.model import Llama, Shape
from pronk.engine.cria.recipe.prompt import load_encoding

SPECIAL_TOKENS = 256


@dataclass(frozen=True)
class Plan:
    """What the training does: `copy_steps` of looking things up, then `steps` of conversations.

    A step of conversations sees about `batch_tokens` tokens, padding included.
    """

    seed: int = 32
    copy_steps: int = 800
    steps: int = 2000
    warmup_steps: int = 50
    decay_steps: int = 800
    batch_tokens: int = 4096
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    tokenizer_conversations: int = 12000
    save_every: int = 100

    def learning_rate_at(self, step: int) -> float:
        """Rise linearly, stay, and fall linearly to zero."""
        rise = min(1.0, (step + 1) / self.warmup_steps)
        fall = min(1.0, (self.copy_steps + self.steps - step) / self.decay_steps)
        return self.learning_rate * min(rise, fall)


def answer_loss(model: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    """Mean cross entropy of the answers' tokens. Prompts are not learned: their chance would drown the answers."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch.tokens[:, :-1])
    return F.cross_entropy(logits[batch.learned].float(), batch.tokens[:, 1:][batch.learned])


def train(plan: Plan, model: Llama, encoding: tiktoken.Encoding, save: Callable[[Llama], None], fast: bool) -> None:
    forward = torch.compile(model, dynamic=True) if fast else model
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if weight.ndim == 1] + [model.model.embed_tokens.weight]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    started, tokens, recent = time.monotonic(), 0, 0.0
    lessons = chain(
        islice(copying(plan.seed, len(model.model.embed_tokens.weight) - SPECIAL_TOKENS), plan.copy_steps),
        islice(talking(plan.seed, encoding, plan.batch_tokens), plan.steps),
    )
    for step, batch in enumerate(lessons):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = plan.learning_rate_at(step)
        loss = answer_loss(forward, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tokens += batch.tokens.numel()
        recent = loss.item() if step == 0 else 0.95 * recent + 0.05 * loss.item()
        if step % 20 == 0:
            seconds = time.monotonic() - started
            print(f"step {step} loss {recent:.4f} tokens {tokens} seconds {seconds:.0f}", flush=True)
        if (step + 1) % plan.save_every == 0:
            save(model)
    save(model)


def save_weights(model: Llama, folder: Path) -> None:
    """`model.safetensors` in bfloat16, names and row order as Hugging Face has them."""
    weights = {name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_configs(shape: Shape, first_special: int, folder: Path) -> None:
    config = shape.huggingface_config(first_special)
    generation = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
        # A manual should give the same answer each time.
        "do_sample": False,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def new_model(plan: Plan, shape: Shape) -> Llama:
    torch.manual_seed(plan.seed)
    return Llama(shape)


def read_model(folder: Path, shape: Shape) -> Llama:
    """The model that an earlier run wrote there."""
    model = Llama(shape)
    model.load_state_dict({name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()})
    return model


def learn_tokens(plan: Plan, count: int) -> dict[bytes, int]:
    print(f"learning {count} tokens", flush=True)
    pieces = bpe.count_pieces(corpus.sample_texts(plan.seed + 1, plan.tokenizer_conversations))
    return bpe.train(pieces, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("cria"), help="the folder to write (default: ./cria)")
    parser.add_argument("--steps", type=int, default=Plan.steps, help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=Plan.seed, help="of weights and corpus (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=Plan.learning_rate, help="(default: %(default)s)")
    parser.add_argument(
        "--continue-from", type=Path, help="an earlier output: keep its tokens and weights, and only read conversations"
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="do without torch.compile, which needs a C++ compiler"
    )
    arguments = parser.parse_args()
    folder, earlier = arguments.output, arguments.continue_from
    folder.mkdir(parents=True, exist_ok=True)
    shape = Shape()
    plan = Plan(seed=arguments.seed, steps=arguments.steps, learning_rate=arguments.learning_rate)
    if earlier is None:
        ranks, model = learn_tokens(plan, shape.vocab_size - SPECIAL_TOKENS), new_model(plan, shape)
    else:
        plan = replace(plan, copy_steps=0)
        ranks, model = bpe.read(earlier / "tokenizer.model"), read_model(earlier, shape)
    bpe.write(ranks, folder / "tokenizer.model")
    write_configs(shape, len(ranks), folder)
    train(plan, model, load_encoding(ranks), lambda model: save_weights(model, folder), not arguments.no_compile)


if __name__ == "__main__":
    main()
