"""pronk: the command. Reads flags and environment, and hands a ServerConfig on.

Imports little: what serves is imported when it is about to serve, so that --help and a wrong flag answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence

import pronk
from pronk.engine.errors import ConfigError, PronkError
from pronk.engine.newborn import Newborn
from pronk.engine.torchrun import Position, position_of
from pronk.server.config import ServerConfig
from pronk.server.options import Parser, UsageError, add_options, assemble, options_of, unknown_flag, warnings_about

USAGE_EXIT = 2
FAILURE_EXIT = 1

SERVE_DESCRIPTION = """\
Serve a Llama over OpenAI's API.

MODEL is a folder that holds a checkpoint, or a Hugging Face Hub id; without it, the small model that comes with Pronk
is served. Each flag can also be given by the environment variable in brackets; a flag wins. [PRONK_MODEL] is MODEL.
"""


def main(arguments: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> int:
    """arguments: without the program's name; both default to the process's own. -> exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    environment = os.environ if environment is None else environment
    try:
        return _run(arguments, environment)
    except ConfigError as error:
        return _complain(error, USAGE_EXIT)
    except PronkError as error:
        return _complain(error, FAILURE_EXIT)


def _run(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    parser, serve_parser = _parsers()
    options = list(options_of(ServerConfig))
    add_options(serve_parser, options)
    known, unknown = parser.parse_known_args(list(arguments))
    if known.command is None:
        if unknown:
            raise UsageError(f"there is no command {unknown[0]}: `pronk --help` lists those there are")
        parser.print_help(sys.stderr)
        return USAGE_EXIT
    if unknown:
        raise unknown_flag(unknown[0], options)
    for warning in warnings_about(environment, options):
        print(f"pronk: warning: {warning}", file=sys.stderr)
    config = assemble(ServerConfig, options, vars(known), environment)
    position = position_of(environment)
    if position is not None:
        config = placed(config, position)
        if position.rank > 0:
            from pronk.engine.follower import follow_rank_0

            return follow_rank_0(config.engine, position)

    newborn = Newborn()  # has begun to import torch when the server imports what it needs
    try:
        from pronk.server.lifecycle import serve

        return serve(config, newborn)
    finally:
        newborn.end()


def placed(config: ServerConfig, position: Position) -> ServerConfig:
    """-> the config of one of the processes that torchrun started. Raises ConfigError when they are too many or few."""
    engine = dataclasses.replace(config.engine, position=position)
    if position.size == 1:  # it is the only one: as if torchrun were not there
        engine = config.engine
    return dataclasses.replace(config, engine=engine)


def _parsers() -> tuple[Parser, Parser]:
    """-> the command's parser, and that of `serve`."""
    parser = Parser(prog="pronk", description="An inference server for the Llama 3.2 family.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"pronk {pronk.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    serve_parser = commands.add_parser(
        "serve",
        help="serve a model over OpenAI's API",
        description=SERVE_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    serve_parser.add_argument("model", nargs="?", metavar="MODEL", help="a folder with a checkpoint, or a Hub id")
    return parser, serve_parser


def _complain(error: PronkError, code: int) -> int:
    print(f"pronk: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
