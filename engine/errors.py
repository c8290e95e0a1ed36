"""Every error that Pronk raises on purpose.

PronkError
├── ConfigError                 a flag or a field holds a value that cannot work
├── CheckpointError             the model's files cannot be used
│   ├── CheckpointNotFoundError     no such folder, no such repository, or no right to read it
│   ├── CheckpointFormatError       config, index or tokenizer file that is damaged or not a Llama
│   └── TensorError                 a tensor missing, unexpected, or of the wrong shape
├── RequestError                this one request cannot be served as it is asked (the client's fault)
│   ├── InvalidParameterError       a value out of range, or not supported
│   └── ContextLengthError          prompt and completion do not fit into the model's context
├── NonFiniteLogitsError        the model produced NaN or infinity for this one request
└── EngineError                 the engine cannot serve anybody
    ├── EngineStartError            it did not come up
    ├── EngineDeadError             its processes are gone, until they are up again
    ├── EngineDrainingError         it is shutting down and takes nothing new
    └── GroupError                  a rank of a tensor-parallel group is gone or does not answer
        └── LeaderGone                  it is rank 0, which tells the others what to compute

A message is one sentence that says what to do. Whoever adds a class draws it here.
"""

from __future__ import annotations

from collections.abc import Iterable


class PronkError(Exception):
    """Root of the tree: catching it catches what Pronk raises on purpose, and no programming error."""


class ConfigError(PronkError):
    """A flag or a field holds a value that cannot work."""


class CheckpointError(PronkError):
    """The model's files cannot be used."""


class CheckpointNotFoundError(CheckpointError):
    """No such folder, no such repository on the Hub, or no right to read it."""


class CheckpointFormatError(CheckpointError):
    """A config, index or tokenizer file is damaged, or describes something that is not a Llama."""


class TensorError(CheckpointError):
    """A tensor is missing, unexpected, or of the wrong shape; the message names it, its file, and what was expected."""


class RequestError(PronkError):
    """One request cannot be served as it is asked.

    param: the name of the field at fault as the client spelled it, or None when no single field is.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidParameterError(RequestError):
    """A value is out of range, of the wrong kind, or asks for something that is not supported."""


class ContextLengthError(RequestError):
    """Prompt and completion do not fit into the model's context."""


class NonFiniteLogitsError(PronkError):
    """The model produced NaN or infinity for one request; the others go on."""


class EngineError(PronkError):
    """The engine cannot serve anybody."""


class EngineStartError(EngineError):
    """The engine did not come up."""


class EngineDeadError(EngineError):
    """The engine's processes are gone: others are started in their place, unless it is shutting down."""


class EngineDrainingError(EngineError):
    """The engine is shutting down: it finishes what runs and takes nothing new."""


class GroupError(EngineError):
    """A rank of a tensor-parallel group is gone or does not answer: the group cannot go on without it.

    ranks: those at fault, as far as is known.
    """

    def __init__(self, message: str, ranks: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(sorted(ranks))


class LeaderGone(GroupError):
    """Rank 0 has closed the channel, has died, or has not been heard for too long."""

    def __init__(self, message: str) -> None:
        super().__init__(message, (0,))
