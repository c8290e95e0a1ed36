"""The description of the API says all there is, and nothing that is not so."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Iterator
from typing import Any, get_args, get_origin

import jsonschema
import pytest

from pronk.server import protocol
from pronk.server.app import create_app
from pronk.server.auth import OPEN_PATHS
from pronk.server.config import ServerConfig
from pronk.server.openapi import DescriptionError, complete
from pronk.server.protocol.common import Body, schema_of
from pronk.server.service import Service

from .conftest import Connect

for module in pkgutil.iter_modules(protocol.__path__):
    importlib.import_module(f"{protocol.__name__}.{module.name}")


def subclasses(kind: type[Body]) -> set[type[Body]]:
    return {kind}.union(*(subclasses(sub) for sub in kind.__subclasses__()))


BODIES = sorted(
    (kind for kind in subclasses(Body) if kind.__module__.startswith(protocol.__name__)), key=lambda kind: kind.__name__
)


def is_one_word(annotation: Any) -> bool:
    """A field that can hold one value only says what kind of object it is in."""
    return str(get_origin(annotation)) == "typing.Literal" and len(get_args(annotation)) == 1


@pytest.mark.parametrize("body", BODIES)
def test_every_field_is_described(body: type[Body]) -> None:
    silent = [
        name
        for name, field in body.model_fields.items()
        if not (field.description or "").strip() and not is_one_word(field.annotation)
    ]
    assert not silent, f"{body.__name__}: describe {', '.join(silent)} by Field(description=...)"


@pytest.mark.parametrize("body", BODIES)
def test_descriptions_are_sentences(body: type[Body]) -> None:
    for name, field in body.model_fields.items():
        assert field.description is None or field.description.rstrip()[-1] in ".:!?", f"{body.__name__}.{name}"


def test_names_tell_bodies_apart() -> None:
    names = [body.__name__ for body in BODIES]
    assert len(names) == len(set(names))


def test_two_bodies_of_one_name_cannot_be_described() -> None:
    def operation(kind: str) -> dict[str, Any]:
        schema = {"title": kind, "$defs": {"Part": {"title": "Part", "description": kind}}}
        return {"responses": {}, "requestBody": {"content": {"application/json": {"schema": schema}}}}

    with pytest.raises(DescriptionError, match="Part"):
        complete({"paths": {"/a": {"post": operation("A")}, "/b": {"post": operation("B")}}})


def document() -> dict[str, Any]:
    return create_app(Service(("tiny",)), ServerConfig()).openapi()


DOCUMENT = document()
OPERATIONS = [
    (method, path, operation) for path, methods in DOCUMENT["paths"].items() for method, operation in methods.items()
]


def references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
        for value in part.values():
            yield from references(value)
    elif isinstance(part, list):
        for value in part:
            yield from references(value)


def test_every_reference_leads_somewhere() -> None:
    assert set(references(DOCUMENT)) >= {"#/components/schemas/Error"}
    for reference in references(DOCUMENT):
        place = DOCUMENT
        for step in reference.removeprefix("#/").split("/"):
            place = place[step]
        assert place
    assert "$defs" not in json.dumps(DOCUMENT)


@pytest.mark.parametrize(("method", "path", "operation"), OPERATIONS, ids=str)
def test_every_endpoint_is_described(method: str, path: str, operation: dict[str, Any]) -> None:
    assert operation["summary"]
    assert operation["description"]
    assert ("security" in operation) == (path not in OPEN_PATHS)
    for status in ("4XX", "5XX"):
        assert operation["responses"][status]["content"]["application/json"]["schema"]["$ref"].endswith("/Error")
    assert ("requestBody" in operation) <= (method == "post")


def test_only_what_can_be_streamed_is_described_as_a_stream() -> None:
    streams = {path for _, path, operation in OPERATIONS if "text/event-stream" in str(operation["responses"]["200"])}
    assert streams == {"/v1/chat/completions", "/v1/completions", "/v1/responses"}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
async def test_the_description_of_a_stream_is_that_of_its_events(connect: Connect, path: str) -> None:
    described = DOCUMENT["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]["itemSchema"]
    prompt: dict[str, Any] = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
        "/v1/responses": {"input": "a"},
    }
    body = {"model": "tiny", "stream": True, **prompt.get(path, {})}
    reply = await connect().call("POST", path, json.dumps(body).encode())
    blocks = reply.body.decode().removesuffix("\n\n").split("\n\n")
    assert len(blocks) > 1
    for block in blocks:
        event = dict(line.split(": ", 1) for line in block.split("\n"))
        jsonschema.validate(event, {**described, "additionalProperties": False})


BOUNDS = [
    ("/v1/chat/completions", "truncate_prompt_tokens", [-1, 1, 1000], [-2, 0, 1.5]),
    ("/v1/chat/completions", "stop", ["a" * 4096, ["a"] * 16], ["", "a" * 4097, ["a"] * 17, [""], ["a" * 4097]]),
    ("/detokenize", "tokens", [[], [0]], [[-1], [0.5], "a"]),
]


@pytest.mark.parametrize(("path", "field", "fitting", "others"), BOUNDS)
def test_bounds_that_the_server_keeps_are_described(
    path: str, field: str, fitting: list[Any], others: list[Any]
) -> None:
    body = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    described = jsonschema.Draft202012Validator(body["properties"][field])
    assert all(described.is_valid(value) for value in fitting)
    assert not any(described.is_valid(value) for value in others)


@pytest.mark.parametrize("body", BODIES)
def test_null_and_absent_are_the_same_in_the_description_too(body: type[Body]) -> None:
    schema = schema_of(body)
    own = {"content": {"application/json": {"schema": schema}}}
    complete({"paths": {"/": {"post": {"responses": {}, "requestBody": own}}}})
    told = own["content"]["application/json"]["schema"]
    for name, field in told.get("properties", {}).items():
        is_anything = not field.keys() & {"type", "$ref", "oneOf", "const"}
        takes_null = {"type": "null"} in field.get("anyOf", ()) or field.get("type") == "null" or is_anything
        assert takes_null == (name not in told.get("required", ())), name
    if body.model_config["extra"] == "forbid":
        assert told["additionalProperties"] == {"type": "null"}


def test_what_is_refused_is_described_as_null_or_not_at_all() -> None:
    text = json.dumps(DOCUMENT)
    assert '"image_url"' not in text
    fields = DOCUMENT["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert fields["properties"]["audio"]["type"] == "null"
    assert fields["properties"]["user"] != {"type": "null"}


async def test_the_server_gives_its_description(connect: Connect) -> None:
    client = connect()
    reply = await client.call("GET", "/openapi.json")
    assert reply.status == 200
    assert reply.json == (await client.call("GET", "/openapi.json")).json
    assert reply.json["paths"].keys() == DOCUMENT["paths"].keys()


async def test_what_no_route_reads_is_not_described(connect: Connect) -> None:
    """Every path of the description is answered by a route, and says so to a wrong method."""
    client = connect()
    for _, path, _ in OPERATIONS:
        reply = await client.call("PATCH", path.replace("{model_id}", "tiny").replace("{response_id}", "r"))
        assert (reply.status, reply.error["code"]) == (405, "method_not_allowed"), path
