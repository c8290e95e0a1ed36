"""Chat messages and tools to prompt tokens, by the Llama 3 family's own chat templates, written out as code.

A prompt is made of pieces: text, and special tokens that are named by the code here. Text is encoded by a tokenizer
that knows no special token, so nothing that a user, a tool or a role name spells can open or close a turn.

`normalise` brings an OpenAI client's messages into the shape that the templates were made for; `render` then follows
the template to the letter, its oddities included. Neither knows of HTTP, of sampling, or of what the model answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from pronk.engine.errors import CheckpointFormatError, InvalidParameterError
from pronk.engine.tokenizer import BEGIN_OF_TEXT, Tokenizer

JSONValue: TypeAlias = "str | int | float | bool | Sequence[JSONValue] | Mapping[str, JSONValue] | None"
Tools: TypeAlias = "Sequence[Mapping[str, Any]]"


class TemplateFamily(Enum):
    """Whose template a checkpoint was trained with."""

    LLAMA_3 = "llama-3"
    LLAMA_3_1 = "llama-3.1"
    """3.1 and 3.3."""
    LLAMA_3_2 = "llama-3.2"
    LLAMA_3_2_VISION = "llama-3.2-vision"
    """Its text form; images are refused."""
    LLAMA_GUARD_3 = "llama-guard-3"
    """One verdict on a whole conversation. Known from published renderings, not from the template itself."""
    BASE = "base"
    """Not trained to chat: has no template."""


@dataclass(frozen=True)
class ToolCall:
    """A function that the model called. The templates expect an object for `arguments` and write whatever they get."""

    name: str
    arguments: JSONValue


@dataclass(frozen=True)
class Message:
    """One turn.

    role: system, user, assistant, tool (or ipython, the same), or any other: it becomes the turn's header.
    content: text; for a tool's result any JSON value.
    tool_calls: None where the message calls nothing. The templates refuse any number but one.
    """

    role: str
    content: JSONValue = ""
    tool_calls: tuple[ToolCall, ...] | None = None


@dataclass(frozen=True)
class Special:
    """A special token in a prompt, by its spelling; a type of its own, so that no text is taken for one."""

    name: str


Piece: TypeAlias = "str | Special"

_BEGIN = Special(BEGIN_OF_TEXT)
_START_HEADER = Special("<|start_header_id|>")
_END_HEADER = Special("<|end_header_id|>")
_END_OF_TURN = Special("<|eot_id|>")
_END_OF_MESSAGE = Special("<|eom_id|>")
_PYTHON_TAG = Special("<|python_tag|>")

# The day that the templates name when no clock is at hand; 3.1's never asks for one.
_DAY_WITHOUT_CLOCK = "26 Jul 2024"
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

_TOOLS_IN_SYSTEM = (
    "You have access to the following functions. To call a function, please respond with JSON for a function call."
)
_TOOLS_IN_USER = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best "
    "answers the given prompt.\n\n"
)
_TOOL_CALL_FORMAT = (
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)
_TOOL_ROLES = ("tool", "ipython")

GUARD_CATEGORIES: Mapping[str, str] = {
    "S1": "Violent Crimes",
    "S2": "Non-Violent Crimes",
    "S3": "Sex Crimes",
    "S4": "Child Exploitation",
    "S5": "Defamation",
    "S6": "Specialized Advice",
    "S7": "Privacy",
    "S8": "Intellectual Property",
    "S9": "Indiscriminate Weapons",
    "S10": "Hate",
    "S11": "Self-Harm",
    "S12": "Sexual Content",
    "S13": "Elections",
}
"""The categories of Llama Guard 3 1B, code -> title, in the prompt's order."""


@dataclass(frozen=True)
class RenderOptions:
    """What a template takes beside the messages.

    tools: function definitions; None for none. An empty sequence is not none: it announces a tool environment.
    date_string: the day of the "Today Date" line.
    tools_in_user_message: put the definitions into the first user message, else into the system message.
    add_generation_prompt: end with the open header of the assistant's next turn.
    continue_final_message: leave the last message's turn open, for the model to go on with its text.
    builtin_tools: names of the built-in tools of 3.1 (brave_search, wolfram_alpha, code_interpreter); None for none.
    categories: what Llama Guard looks for, code -> title.
    """

    tools: Tools | None = None
    date_string: str = _DAY_WITHOUT_CLOCK
    tools_in_user_message: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    builtin_tools: Sequence[str] | None = None
    categories: Mapping[str, str] = field(default_factory=lambda: GUARD_CATEGORIES)


class ChatTemplate:
    """One checkpoint's template and tokenizer. Immutable; may be shared by threads.

    today: the clock that the "Today Date" line of 3.2 is read from when a request names no day.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        family: TemplateFamily = TemplateFamily.LLAMA_3_2,
        *,
        today: Callable[[], date] = date.today,
    ) -> None:
        """Raises CheckpointFormatError when the tokenizer lacks a special token that every prompt of the family has."""
        if family is not TemplateFamily.BASE:
            for piece in (_BEGIN, _START_HEADER, _END_HEADER, _END_OF_TURN):
                tokenizer.special(piece.name)
        self.family = family
        self._tokenizer = tokenizer
        self._today = today

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Tools | None = None,
        date_string: str | None = None,
        tools_in_user_message: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        builtin_tools: Sequence[str] | None = None,
        categories: Mapping[str, str] | None = None,
    ) -> list[int]:
        """The prompt's token ids, <|begin_of_text|> first; the parameters are those of RenderOptions.

        Raises InvalidParameterError for what the family's template cannot express.
        """
        options = RenderOptions(
            tools=tools,
            date_string=self._day() if date_string is None else date_string,
            tools_in_user_message=tools_in_user_message,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            builtin_tools=builtin_tools,
            categories=GUARD_CATEGORIES if categories is None else categories,
        )
        return encode_pieces(self._tokenizer, render_pieces(self.family, messages, options))

    def _day(self) -> str:
        if self.family is TemplateFamily.LLAMA_3_1:
            return _DAY_WITHOUT_CLOCK
        today = self._today()
        return f"{today.day:02d} {_MONTHS[today.month - 1]} {today.year:04d}"


def encode_pieces(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> list[int]:
    """Token ids of a prompt. Neighbouring texts are encoded as one, as if the prompt were a single string that is only
    cut at its special tokens."""
    ids: list[int] = []
    text = ""
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
            continue
        if text:
            ids += tokenizer.encode(text)
            text = ""
        ids.append(tokenizer.special(piece.name))
    return ids + tokenizer.encode(text)


def render_pieces(family: TemplateFamily, messages: Sequence[Message], options: RenderOptions) -> list[Piece]:
    """The prompt as text and special tokens. Raises InvalidParameterError for what the template cannot express."""
    _refuse_unsupported(family, messages, options)
    if family is TemplateFamily.LLAMA_GUARD_3:
        pieces = _guard(messages, options.categories)
    elif family is TemplateFamily.LLAMA_3:
        pieces = _plain(messages)
    else:
        pieces = _dated(family, messages, options)
    if options.continue_final_message:
        pieces.pop()  # the last turn's <|eot_id|>
    if options.add_generation_prompt:
        pieces += _header("assistant")
    return pieces


def _refuse_unsupported(family: TemplateFamily, messages: Sequence[Message], options: RenderOptions) -> None:
    if family is TemplateFamily.BASE:
        _refuse("This is a base model: it has no chat template. Use /v1/completions with a plain prompt.", "messages")
    if not messages:
        _refuse("'messages' is empty; a prompt needs at least one message.", "messages")
    if options.builtin_tools is not None and family is not TemplateFamily.LLAMA_3_1:
        _refuse(f"The template of {family.value} has no built-in tools; describe them in 'tools'.", "builtin_tools")
    if family in (TemplateFamily.LLAMA_3, TemplateFamily.LLAMA_GUARD_3):
        if options.tools is not None:
            _refuse(f"The template of {family.value} has no tools; leave 'tools' out.", "tools")
        if any(message.tool_calls is not None or message.role in _TOOL_ROLES for message in messages):
            _refuse(f"The template of {family.value} has no tool calls and no tool results.", "messages")
    if options.continue_final_message:
        _refuse_to_continue(family, messages, options)


def _refuse_to_continue(family: TemplateFamily, messages: Sequence[Message], options: RenderOptions) -> None:
    last = messages[-1]
    leads = last.role == "system" and len(messages) == 1
    if options.add_generation_prompt:
        _refuse("Give either 'continue_final_message' or 'add_generation_prompt', not both.", "continue_final_message")
    if family is TemplateFamily.LLAMA_GUARD_3 or last.tool_calls is not None or last.role in _TOOL_ROLES or leads:
        _refuse(
            "Only a final message of plain text can be continued, not a tool call, a tool result, a system message on "
            "its own, or a conversation to be judged.",
            "continue_final_message",
        )


def _refuse(message: str, param: str) -> NoReturn:
    raise InvalidParameterError(message, param=param)


def _header(role: str) -> list[Piece]:
    return [_START_HEADER, role, _END_HEADER, "\n\n"]


def _turn(role: str, body: str) -> list[Piece]:
    return [*_header(role), body, _END_OF_TURN]


def _trimmed(content: JSONValue) -> str:
    # A value that is no text is printed as Python prints it, as Jinja does.
    return str(content).strip()


def _plain(messages: Sequence[Message]) -> list[Piece]:
    """Llama 3: turns and nothing else."""
    pieces: list[Piece] = [_BEGIN]
    for message in messages:
        pieces += _turn(message.role, _trimmed(message.content))
    return pieces


def _dated(family: TemplateFamily, messages: Sequence[Message], options: RenderOptions) -> list[Piece]:
    """Llama 3.1, 3.2, 3.3 and Vision's text form: a system turn with dates always comes first."""
    system = ""
    rest = list(messages)
    if rest[0].role == "system":
        system = _trimmed(rest.pop(0).content)
    pieces: list[Piece] = [_BEGIN, *_turn("system", _preamble(options) + system)]
    if options.tools is not None and options.tools_in_user_message:
        if not rest:
            _refuse("Cannot put tools in the first user message when there's no first user message!", "messages")
        first = _trimmed(rest.pop(0).content)
        pieces += _turn("user", _TOOLS_IN_USER + _TOOL_CALL_FORMAT + _definitions(options.tools) + first)
    for message in rest:
        pieces += _message(family, message, options.builtin_tools)
    return pieces


def _preamble(options: RenderOptions) -> str:
    """What the system turn says before the system message's own text."""
    text = ""
    if options.tools is not None or options.builtin_tools is not None:
        text += "Environment: ipython\n"
    if options.builtin_tools is not None:
        names = ", ".join(name for name in options.builtin_tools if name != "code_interpreter")
        text += f"Tools: {names}\n\n"
    text += f"Cutting Knowledge Date: December 2023\nToday Date: {options.date_string}\n\n"
    if options.tools is not None and not options.tools_in_user_message:
        text += _TOOLS_IN_SYSTEM + _TOOL_CALL_FORMAT + _definitions(options.tools)
    return text


def _definitions(tools: Tools) -> str:
    return "".join(_json(tool, "tools", indent=4) + "\n\n" for tool in tools)


def _message(family: TemplateFamily, message: Message, builtin_tools: Sequence[str] | None) -> list[Piece]:
    if message.tool_calls is not None:
        if len(message.tool_calls) != 1:
            _refuse("This model only supports single tool-calls at once!", "messages")
        return _tool_call(message.tool_calls[0], builtin_tools)
    if message.role in _TOOL_ROLES:
        return _turn("ipython", _tool_result(message.content))
    if family is TemplateFamily.LLAMA_3_2_VISION:
        return _turn(message.role, _vision_text(message.content))
    return _turn(message.role, _trimmed(message.content))


def _tool_call(call: ToolCall, builtin_tools: Sequence[str] | None) -> list[Piece]:
    # With built-in tools every call waits for its result inside the assistant's turn, which therefore stays unfinished.
    end = _END_OF_TURN if builtin_tools is None else _END_OF_MESSAGE
    if builtin_tools is not None and call.name in builtin_tools:
        return [*_header("assistant"), _PYTHON_TAG, f"{call.name}.call({_builtin_arguments(call)})", end]
    body = f'{{"name": "{call.name}", "parameters": {_json(call.arguments, "messages")}}}'
    return [*_header("assistant"), body, end]


def _builtin_arguments(call: ToolCall) -> str:
    if not isinstance(call.arguments, Mapping) or not all(isinstance(value, str) for value in call.arguments.values()):
        _refuse(
            f"The arguments of the built-in tool {call.name} must be an object whose values are strings.", "messages"
        )
    return ", ".join(f'{name}="{value}"' for name, value in call.arguments.items())


def _tool_result(content: JSONValue) -> str:
    # Text too is written as JSON, so it gains quotes and escapes; numbers, booleans and null as Python prints them.
    return _json(content, "messages") if isinstance(content, str | Sequence | Mapping) else str(content)


def _vision_text(content: JSONValue) -> str:
    """Vision's template does not trim, and takes a list of parts."""
    if isinstance(content, str) or not isinstance(content, Sequence):
        return str(content)
    return "".join(_part_text(part, "messages") for part in content)


def _json(value: JSONValue | Mapping[str, Any], param: str, indent: int | None = None) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidParameterError(
            f"'{param}' holds a value that cannot be written as JSON: {error}.", param
        ) from error


def _guard(messages: Sequence[Message], categories: Mapping[str, str]) -> list[Piece]:
    """Llama Guard 3: the conversation inside a single user turn, with the task around it."""
    for place, message in enumerate(messages):
        expected = "user" if place % 2 == 0 else "assistant"
        if message.role != expected:
            _refuse(
                f"Llama Guard judges turns that alternate between user and assistant, user first; message {place} has "
                f"the role '{message.role}'.",
                "messages",
            )
    who = "User" if messages[-1].role == "user" else "Agent"
    listed = "".join(f"{code}: {title}.\n" for code, title in categories.items())
    spoken = "".join(
        f"{'User' if message.role == 'user' else 'Agent'}: {_trimmed(message.content)}\n\n" for message in messages
    )
    body = (
        f"Task: Check if there is unsafe content in '{who}' messages in conversations according our safety policy with "
        "the below categories.\n\n"
        f"<BEGIN UNSAFE CONTENT CATEGORIES>\n{listed}<END UNSAFE CONTENT CATEGORIES>\n\n"
        f"<BEGIN CONVERSATION>\n\n{spoken}<END CONVERSATION>\n\n"
        f"Provide your safety assessment for ONLY THE LAST {who} message in the above conversation:\n"
        " - First line must read 'safe' or 'unsafe'.\n"
        " - If unsafe, a second line must include a comma-separated list of violated categories. "
    )
    return [_BEGIN, *_turn("user", body)]


def normalise(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages as OpenAI's clients send them, brought into the shape that the templates were made for.

    - A list of text parts becomes one text, the parts joined without a separator; other parts are refused.
    - A null or missing content becomes "".
    - Null and empty `tool_calls` are dropped; `arguments` is parsed from JSON, and "" is an empty object. What is not
      JSON, as a model may have written it and a client sends it back, is shown to it as the text that it is.
    - The role developer becomes system.
    - The templates know one call a message, and print no text beside it. So an assistant message of text and calls
      becomes a message of the text (if there is any), then one message a call; each call is followed by its result when
      the tool messages that come next can be told apart by `tool_call_id`. Results that match no call keep their order.
    - `tool_call_id` serves for that only, and `name` is not shown to the model, as the templates have no place for it.

    Raises InvalidParameterError, naming the message, for what is not of that form.
    """
    normal: list[Message] = []
    place = 0
    while place < len(messages):
        message = messages[place]
        param = f"messages[{place}]"
        role = _role(message, param)
        text = _text(message.get("content"), f"{param}.content")
        calls = _calls(message.get("tool_calls"), role, f"{param}.tool_calls")
        place += 1
        if not calls:
            normal.append(Message(role, text))
            continue
        if text.strip():
            normal.append(Message(role, text))
        results: list[tuple[str | None, Message]] = []
        while place < len(messages) and messages[place].get("role") == "tool":
            content = _text(messages[place].get("content"), f"messages[{place}].content")
            results.append((messages[place].get("tool_call_id"), Message("tool", content)))
            place += 1
        normal += _with_results(calls, results)
    return normal


def _with_results(
    calls: Sequence[tuple[str | None, ToolCall]], results: Sequence[tuple[str | None, Message]]
) -> list[Message]:
    call_ids = [call_id for call_id, _ in calls]
    distinct = None not in call_ids and len(set(call_ids)) == len(call_ids)
    messages: list[Message] = []
    for call_id, call in calls:
        messages.append(Message("assistant", "", (call,)))
        if distinct:
            messages += [result for result_id, result in results if result_id == call_id]
    messages += [result for result_id, result in results if not distinct or result_id not in call_ids]
    return messages


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


def _role(message: Mapping[str, Any], param: str) -> str:
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        _refuse(f"'{param}.role' is {role!r}; it must be one of {', '.join(_ROLES)}.", f"{param}.role")
    if message.get("function_call") is not None:
        _refuse(f"'{param}.function_call' is not supported; use 'tool_calls'.", f"{param}.function_call")
    return _ROLES[role]


def _text(content: object, param: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        _refuse(f"'{param}' must be text or a list of parts.", param)
    return "".join(_part_text(part, f"{param}[{place}]") for place, part in enumerate(content))


def _part_text(part: object, param: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(part, Mapping) and kind in ("text", "refusal") and isinstance(part.get(kind), str):
        return str(part[kind])
    _refuse(f"'{param}' is a content part of type {kind!r}; this model takes parts of type 'text' only.", param)


def _calls(tool_calls: object, role: str, param: str) -> list[tuple[str | None, ToolCall]]:
    if tool_calls is None or tool_calls == [] or tool_calls == ():
        return []
    if not isinstance(tool_calls, Sequence) or isinstance(tool_calls, str):
        _refuse(f"'{param}' must be a list.", param)
    if role != "assistant":
        _refuse(f"'{param}' stands in a message of role '{role}'; only the assistant calls tools.", param)
    return [_call(call, f"{param}[{place}]") for place, call in enumerate(tool_calls)]


def _call(call: object, param: str) -> tuple[str | None, ToolCall]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        _refuse(f"'{param}' must be a call of a function, with its name and arguments.", param)
    call_id = call.get("id")
    arguments = _arguments(function.get("arguments"), f"{param}.function.arguments")
    return call_id if isinstance(call_id, str) else None, ToolCall(function["name"], arguments)


def _arguments(arguments: object, param: str) -> JSONValue:
    if isinstance(arguments, Mapping):
        return arguments
    if not isinstance(arguments, str):
        _refuse(f"'{param}' must be a JSON object, written as a string.", param)
    if not arguments.strip():
        return {}
    try:
        value: JSONValue = json.loads(arguments, parse_constant=_refuse_constant)
        json.dumps(value)
    except (ValueError, RecursionError):
        return arguments
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def read_chat_template(folder: Path) -> str | None:
    """The text of the checkpoint's Jinja template, or None where it has none: from `chat_template.jinja`, else
    `chat_template.json`, else `tokenizer_config.json`; of several named ones the one named "default".

    Raises CheckpointFormatError, naming the file, for one that is damaged.
    """
    jinja_file = folder / "chat_template.jinja"
    try:
        if jinja_file.is_file():
            return jinja_file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointFormatError(f"{jinja_file} is not UTF-8: {error}.") from error
    for file in (folder / "chat_template.json", folder / "tokenizer_config.json"):
        if not file.is_file():
            continue
        try:
            document = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            raise CheckpointFormatError(f"{file} is not JSON: {error}.") from error
        template = document.get("chat_template") if isinstance(document, dict) else None
        if isinstance(template, list):
            named = [entry.get("template") for entry in template if entry.get("name") == "default"]
            template = named[0] if named else None
        if isinstance(template, str):
            return template
    return None


def template_family(chat_template: str | None) -> TemplateFamily:
    """The family that a Jinja template belongs to, told by what only that one says. No template text is taken for
    Llama 3.2 Instruct's.

    The text is only recognised, never run: a fine-tune's small changes to it are not followed.
    Raises CheckpointFormatError for a template of another format.
    """
    if chat_template is None:
        return TemplateFamily.LLAMA_3_2
    if "<|start_header_id|>" not in chat_template:
        raise CheckpointFormatError(
            "The checkpoint's chat template is not one of Llama 3's formats (it has no <|start_header_id|>); only "
            "those can be used for chat."
        )
    if "UNSAFE CONTENT CATEGORIES" in chat_template:
        return TemplateFamily.LLAMA_GUARD_3
    if "UNSAFECONTENT CATEGORIES" in chat_template:
        raise CheckpointFormatError("Llama Guard 3 11B Vision is not supported; use Llama Guard 3 1B or 8B.")
    if "Cutting Knowledge Date" not in chat_template:
        return TemplateFamily.LLAMA_3
    if "<|image|>" in chat_template:
        return TemplateFamily.LLAMA_3_2_VISION
    return TemplateFamily.LLAMA_3_2 if "strftime_now" in chat_template else TemplateFamily.LLAMA_3_1
