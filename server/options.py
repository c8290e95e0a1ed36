"""Flags and environment variables, generated from the `option(...)` declarations of the frozen config dataclasses.

One conversion for both sources: a flag wins over its environment variable, which wins over the default. Knows
dataclasses and text; no option by name but MODEL.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from pronk.engine.errors import ConfigError

PREFIX = "PRONK_"
MODEL_VARIABLE = "PRONK_MODEL"
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})
# What Kubernetes sets in every container beside a service of the name `pronk`: PRONK_PORT=tcp://10.0.0.7:8000 and more.
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://")
_SERVICE_VARIABLE = re.compile(r"PRONK_(SERVICE_\w+|PORT_\d+_\w+)")


class UsageError(ConfigError):
    """The command line itself is wrong: the message is for a person who can look at --help."""


@dataclasses.dataclass(frozen=True)
class Option:
    """One declared field. path: the field's name, after those of the dataclasses that hold it."""

    path: tuple[str, ...]
    flag: str
    help: str
    default: Any
    kind: type
    choices: tuple[str, ...]
    metavar: str

    @property
    def variable(self) -> str:
        return PREFIX + self.flag.removeprefix("--").replace("-", "_").upper()

    @property
    def destination(self) -> str:
        return ".".join(self.path)

    def convert(self, text: str, source: str) -> Any:
        """text: as it was written. source: where, for the message. Raises ConfigError."""
        if self.kind is bool:
            return self._switched(text, source)
        if self.choices and text not in self.choices:
            raise ConfigError(f"{source} {text!r}: choose one of {', '.join(self.choices)}")
        if self.kind is tuple:
            return tuple(part.strip() for part in text.split(","))
        try:
            return self.kind(text)
        except ValueError:
            wanted = {int: "a whole number", float: "a number"}[self.kind]
            raise ConfigError(f"{source} {text!r}: write {wanted}") from None

    def _switched(self, text: str, source: str) -> bool:
        """A switch is the opposite of its default: --no-enable-prefix-caching sets enable_prefix_caching to false."""
        if text.lower() not in _TRUE | _FALSE:
            raise ConfigError(f"{source} {text!r}: write 1 or 0")
        return bool(self.default) != (text.lower() in _TRUE)


def options_of(config: type, path: tuple[str, ...] = ()) -> Iterator[Option]:
    """config: a dataclass. -> its options and those of the dataclasses it holds, in the order of their declaration."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        here = (*path, field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            yield from options_of(hints[field.name], here)
        elif "flag" in field.metadata:
            about = field.metadata
            yield Option(
                path=here,
                flag=about["flag"],
                help=about["help"],
                default=field.default,
                kind=_kind(hints[field.name]),
                choices=about["choices"],
                metavar=about["metavar"],
            )


def _kind(hint: Any) -> type:
    """int | None -> int; tuple[str, ...] -> tuple."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    return typing.cast(type, typing.get_origin(hint) or hint)


class Parser(argparse.ArgumentParser):
    """Complains in one sentence, by raising UsageError."""

    def error(self, message: str) -> NoReturn:
        match = re.fullmatch(r"argument (?P<flag>\S+?)(/\S+)?: expected one argument", message)
        if match is not None:
            raise UsageError(f"{match['flag']} needs a value after it")
        match = re.fullmatch(r"argument \S+: invalid choice: (?P<word>.+?) \(choose from .*\)", message)
        if match is not None:
            raise UsageError(
                f"{match['word']} is no command of {self.prog}: `{self.prog} --help` lists those there are"
            )
        raise UsageError(message)


def add_options(parser: argparse.ArgumentParser, options: Sequence[Option]) -> None:
    """Values stay text here: `assemble` converts those of flags and of variables alike."""
    for option in options:
        help_text = f"{option.help}{_default_text(option)} [{option.variable}]".replace("%", "%%")
        if option.kind is bool:
            parser.add_argument(
                option.flag, dest=option.destination, action="store_const", const="1", default=None, help=help_text
            )
        else:
            metavar = option.metavar or ("{" + ",".join(option.choices) + "}" if option.choices else "N")
            parser.add_argument(option.flag, dest=option.destination, default=None, metavar=metavar, help=help_text)


def _default_text(option: Option) -> str:
    if option.kind is bool or option.default in (None, ()):
        return ""
    default = f"{option.default:g}" if isinstance(option.default, float) else option.default
    return f" (default: {default})"


def unknown_flag(argument: str, options: Sequence[Option]) -> UsageError:
    """-> one sentence about a word on the command line that means nothing. To be raised."""
    if not argument.startswith("-"):
        return UsageError(f"{argument!r} is one word too many: give one MODEL, and flags")
    name = argument.partition("=")[0]
    close = difflib.get_close_matches(name, [option.flag for option in options], n=1)
    hint = f"did you mean {close[0]}?" if close else "`pronk serve --help` lists those there are"
    return UsageError(f"there is no flag {name}: {hint}")


def assemble(
    config: type, options: Sequence[Option], flags: Mapping[str, str | None], environment: Mapping[str, str]
) -> Any:
    """flags: destination -> text, or None where the flag was not given. -> an instance of config.

    Raises ConfigError, which names the flag, or the variable where the value came from there.
    """
    values: dict[tuple[str, ...], Any] = {}
    from_environment: list[Option] = []
    for option in options:
        text, source = flags.get(option.destination), option.flag
        if text == "":
            raise ConfigError(f"{option.flag} needs a value after it")
        if text is None:
            text, source = environment.get(option.variable, ""), option.variable
            if not text or _SERVICE_LINK.match(text):
                continue  # an empty variable is one that is not set
            from_environment.append(option)
        values[option.path] = option.convert(text, source)
    model = flags.get("model") or environment.get(MODEL_VARIABLE)
    if model:
        values["engine", "model"] = model
    try:
        return _build(config, values)
    except ConfigError as error:
        raise ConfigError(_blame_variables(str(error), from_environment)) from None


def _build(config: type, values: Mapping[tuple[str, ...], Any]) -> Any:
    hints = typing.get_type_hints(config)
    arguments = {}
    for field in dataclasses.fields(config):
        inner = {path[1:]: value for path, value in values.items() if path[0] == field.name}
        if dataclasses.is_dataclass(hints[field.name]):
            arguments[field.name] = _build(typing.cast(type, hints[field.name]), inner)
        elif inner:
            arguments[field.name] = inner[()]
    return config(**arguments)


def _blame_variables(message: str, options: Sequence[Option]) -> str:
    """A config names its flags; whoever set the variable instead is told the variable."""
    for option in options:
        message = re.sub(rf"{re.escape(option.flag)}(?![\w-])", option.variable, message)
    return message


def warnings_about(environment: Mapping[str, str], options: Sequence[Option]) -> Iterator[str]:
    """-> a sentence for each PRONK_ variable that means nothing."""
    known = {option.variable for option in options} | {MODEL_VARIABLE}
    for name in sorted(environment):
        if name in known and _SERVICE_LINK.match(environment[name]):
            yield (
                f"{name}={environment[name]} comes from a Kubernetes service of this name and is ignored: "
                "set enableServiceLinks: false in the pod"
            )
        if not name.startswith(PREFIX) or name in known or _SERVICE_VARIABLE.fullmatch(name):
            continue
        close = difflib.get_close_matches(name, known, n=1)
        yield f"the environment variable {name} means nothing to pronk serve" + (
            f": did you mean {close[0]}?" if close else ""
        )
