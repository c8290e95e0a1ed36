"""The page of the HTTP API, made of its own description: endpoints, bodies field by field, errors, headers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pronk.server import errors
from pronk.server.app import create_app
from pronk.server.config import ServerConfig
from pronk.server.errors import Answer, headers_of
from pronk.server.service import Service

Schema = dict[str, Any]

BEFORE = """
Endpoints of OpenAI's API, of vLLM's where OpenAI has none, and of monitors. The same in OpenAPI's form: `GET
/openapi.json` of a running server.

- A body is JSON in UTF-8, whatever its content type says, of 8 MiB at most. Types are strict: `"1"` is no number.
- `null` says the same as leaving a field out. A field that is not listed is refused, unless it is `null`: ignoring it
  could change the answer.
- With `--api-key`, every path but `/health` and `/ping` needs `Authorization: Bearer KEY`.
- A stream is server-sent events. A line that begins with `:` is a comment, which keeps a silent connection open.
"""

HEADERS = """
| header | of | meaning |
|---|---|---|
| `x-request-id` | request | up to 128 printable characters: the request's name in the answer and in the log |
| `x-request-id` | answer | that name, or one that the server made |
| `openai-processing-ms` | answer | milliseconds until the answer began |
| `retry-after` | answer, 429 and 503 | seconds after which to come again |
| `x-should-retry` | answer, 429 and 5xx | whether the same request can succeed later; OpenAI's clients obey it |
| `www-authenticate` | answer, 401 | `Bearer` |
| `access-control-...` | answer | for web pages of `--allowed-origins` |
"""


def page(note: str) -> str:
    """note: the line that says where the page comes from. -> the page, in Markdown."""
    document = create_app(Service(("model",)), ServerConfig()).openapi()
    parts = [
        "# The HTTP API\n\n" + note + BEFORE,
        "## Endpoints\n\n" + _endpoints(document),
        "## Headers\n" + HEADERS,
        "## Errors\n\n" + _errors(),
        "## Bodies of requests\n\n" + "\n".join(_bodies(document)),
    ]
    return "\n".join(parts)


def _endpoints(document: Schema) -> str:
    rows = ["| method | path | body | what it does |", "|---|---|---|---|"]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            bodies = ", ".join(_link(name) for name in _names_of_body(operation))
            told = f"{operation['summary']}. {_one_line(operation.get('description', ''))}"
            rows.append(f"| {method.upper()} | `{path}` | {bodies} | {told} |")
    return "\n".join(rows) + "\n"


def _names_of_body(operation: Schema) -> Iterator[str]:
    for schema in _schemas_of_body(operation):
        yield schema["title"]


def _schemas_of_body(operation: Schema) -> list[Schema]:
    content = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if content is None:
        return []
    return list(content["schema"].get("anyOf", [content["schema"]]))


def _errors() -> str:
    head = (
        'A body of `{"error": {"message", "type", "param", "code"}}`; `param` names the field at fault, as in\n'
        "`messages[0].content`. In a stream that has begun, the same object is an event, and the stream ends.\n\n"
        "| status | code | type | when | try again |\n|---|---|---|---|---|\n"
    )
    answers = dict.fromkeys(value for value in vars(errors).values() if isinstance(value, Answer))
    answers.update(dict.fromkeys(errors.ANSWERS.values()))
    rows = [
        f"| {answer.status} | `{answer.code}` | `{answer.type}` | {answer.when} | {_again(answer)} |"
        for answer in sorted(answers, key=lambda answer: (answer.status, answer.code or ""))
        if answer.code is not None
    ]
    return head + "\n".join(rows) + "\n"


def _again(answer: Answer) -> str:
    headers = headers_of(answer)
    if "retry-after" in headers:
        return f"after {headers['retry-after']} s"
    return {"false": "no", None: ""}[headers.get("x-should-retry")]


def _bodies(document: Schema) -> Iterator[str]:
    """One section for each body, then for each object in one, in the order in which they are met."""
    schemas = document["components"]["schemas"]
    waiting = [
        schema
        for operations in document["paths"].values()
        for operation in operations.values()
        for schema in _schemas_of_body(operation)
    ]
    told: set[str] = set()
    while waiting:
        schema = waiting.pop(0)
        if schema["title"] in told:
            continue
        told.add(schema["title"])
        yield _section(schema)
        waiting += [schemas[name] for name in re.findall(r"#/components/schemas/(\w+)", str(schema))]


def _section(schema: Schema) -> str:
    required = schema.get("required", ())
    rows = [
        f"| `{name}` | {_kind(field)} | {_default(field, is_required=name in required)} | {_about(field)} |"
        for name, field in schema.get("properties", {}).items()
    ]
    about = _one_line(schema.get("description", ""))
    more = "" if "additionalProperties" in schema else " Further fields may stand in it."
    text = f"### {schema['title']}\n\n"
    if about or more:
        text += f"{about}{more}".strip() + "\n\n"
    return text + "| field | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


def _about(field: Schema) -> str:
    if "description" in field:
        return _one_line(field["description"])
    return "Says which kind of object this is." if "const" in field else ""


def _default(field: Schema, *, is_required: bool) -> str:
    if is_required:
        return "required"
    default = field.get("default")
    return "" if default is None else f"`{_literal(default)}`"


def _kind(schema: Schema) -> str:
    """A schema in words."""
    if "$ref" in schema:
        return _link(schema["$ref"].rpartition("/")[2])
    if "const" in schema:
        return f"`{_literal(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{_literal(value)}`" for value in schema["enum"])
    several = [part for part in schema.get("anyOf", schema.get("oneOf", [])) if part != {"type": "null"}]
    if several:
        return " or ".join(_kind(part) for part in several)
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"list of {_kind(schema.get('items', {}))}{_bounds(schema, 'minItems', 'maxItems', ' items')}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_kind(schema['additionalProperties'])}"
    if kind == "string":
        pattern = f" like `{schema['pattern']}`" if "pattern" in schema else ""
        return f"string{pattern}{_bounds(schema, 'minLength', 'maxLength', ' characters')}"
    form = f" ({schema['format']})" if "format" in schema else ""
    return f"{kind}{form}{_bounds(schema, 'minimum', 'maximum')}"


def _bounds(schema: Schema, least: str, most: str, unit: str = "") -> str:
    low, high = schema.get(least), schema.get(most)
    if "exclusiveMinimum" in schema:
        return f", more than {schema['exclusiveMinimum']:g}, at most {high:g}"
    if low is None and high is None:
        return ""
    if high is None:
        return f", at least {low:g}{unit}"
    if low is None:
        return f", at most {high:g}{unit}"
    return f", {low:g}{unit}" if low == high else f", {low:g} to {high:g}{unit}"


def _literal(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


def _link(name: str) -> str:
    return f"[{name}](#{name.lower()})"


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
