"""A JSON schema as a client sends it -> one that the grammar library enforces to the letter, or an error that names
what it does not.

The library refuses most of what it cannot enforce. What is left to do here: keywords that it takes for annotations,
what it enforces too loosely (`format`, `minProperties`, a class in a `pattern`), alternatives that exclude each other
where it does not see it (`oneOf`), and limits, so that any schema is answered in time.

Reads JSON, never a network or a file: a `$ref` leads to a place in the same schema or is refused.
"""

from __future__ import annotations

import difflib
import json
import math
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pronk.engine.errors import InvalidParameterError
from pronk.engine.grammar import formats, regex

PARAM = "structured_outputs"

MAX_BYTES = 1 << 18
MAX_DEPTH = 100
MAX_SCHEMAS = 20_000
MAX_PROPERTIES = 2_000
MAX_OPTIONAL = 400
"""Of one object: what may be left out costs the library the square of its number."""
MAX_ALTERNATIVES = 1_000
MAX_VALUES = 4_096
MAX_MULTIPLE = 1_000
MAX_REPEATS = 10_000
MAX_UNKNOWN = 100
_MAX_WORK = 200_000
_MOST_COMPARED = 100

_ONE = ("items", "additionalItems", "additionalProperties")
_LIST = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAP = ("properties", "patternProperties", "$defs", "definitions")

# fmt: off
ENFORCED = frozenset(
    {
        "type", "enum", "const", "$ref", "anyOf", "oneOf", "allOf", "properties", "required",
        "additionalProperties", "patternProperties", "minProperties", "maxProperties", "items", "prefixItems",
        "additionalItems", "minItems", "maxItems", "minLength", "maxLength", "pattern", "format", "minimum",
        "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
    }
)
# fmt: on
"""Keywords that a completion's text keeps to."""

# fmt: off
ANNOTATIONS = frozenset(
    {
        "$schema", "$id", "id", "$anchor", "$comment", "$defs", "definitions", "title", "description",
        "default", "example", "examples", "deprecated", "readOnly", "writeOnly", "contentMediaType",
        "contentEncoding", "contentSchema", "discriminator", "xml", "externalDocs",
    }
)
# fmt: on
"""Keywords that say nothing of which values are valid."""

# fmt: off
REFUSED = frozenset(
    {
        "not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "propertyNames",
        "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedItems", "unevaluatedProperties",
        "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor", "$vocabulary", "nullable",
        "extends", "disallow", "divisibleBy",
    }
)
# fmt: on
"""Keywords that would change which values are valid, and are not enforced."""

_HARMLESS = {"uniqueItems": False, "nullable": False}
_DRAFTS = ("2020-12/", "2019-09/", "draft-07/", "draft-06/", "draft-04/")
_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")


@dataclass(frozen=True)
class JSONSchema:
    """text: the schema, for the grammar library.

    jump: by how many bytes the shortest completion grows at most when one token is taken.
    patterns: all that strings are asked to match.
    string_jump: the same, of a token of characters in a string that is a value and could be any string.
    """

    text: str
    jump: int
    patterns: tuple[str, ...]
    string_jump: int


def read_schema(text: str, *, options_allowed: bool = False) -> JSONSchema:
    """text: JSON. options_allowed: the library's own "x-guidance" at the top is dropped instead of refused.

    Raises InvalidParameterError, naming the keyword and its place, for what is not enforced or is no schema.
    """
    if len(text) > MAX_BYTES or len(text.encode(errors="replace")) > MAX_BYTES:
        raise _refusal(f"The schema has more than {MAX_BYTES} bytes; send a smaller one.")
    schema = _parse(text)
    if options_allowed and isinstance(schema, dict):
        schema.pop("x-guidance", None)
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    if not isinstance(schema, dict):
        raise _refusal(f"A JSON schema is an object, but this one is {json.dumps(schema)[:60]}.")
    walk = _Walk(schema)
    sizes = _Sizes(walk)
    jump = sizes.jump()
    walk.rewrite()
    return JSONSchema(
        json.dumps(schema, ensure_ascii=False),
        jump=jump,
        patterns=tuple(walk.patterns),
        string_jump=jump if walk.mixes_strings else walk.string_jump,
    )


def _refusal(message: str) -> InvalidParameterError:
    return InvalidParameterError(message, PARAM)


def _parse(text: str) -> Any:
    def constant(name: str) -> float:
        raise ValueError(f"{name} is no JSON")

    try:
        schema = json.loads(text, parse_constant=constant)
        _require_sane(schema)
        text.encode()
    except RecursionError:
        raise _refusal(f"The schema is nested more than {MAX_DEPTH} levels deep.") from None
    except (ValueError, OverflowError) as error:
        raise _refusal(f"The schema is not JSON: {str(error)[:200]}.") from error
    return schema


def _require_sane(schema: Any) -> None:
    waiting: list[tuple[Any, int]] = [(schema, 1)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise RecursionError
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("a number in it is too large")
        if isinstance(value, str):
            value.encode()  # an escaped lone surrogate is no text
        elif isinstance(value, dict):
            waiting += [(key, depth) for key in value]
            waiting += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, list):
            waiting += [(item, depth + 1) for item in value]


class _Walk:
    """Every schema inside one, checked.

    schemas: place (a JSON pointer) -> schema. references: place -> the place that its `$ref` leads to.
    """

    def __init__(self, root: dict[str, Any]) -> None:
        self.root = root
        self.schemas: dict[str, Any] = {}
        self.references: dict[str, str] = {}
        self.patterns: list[str] = []
        self.string_jump = 0
        self._has_mixed_alternatives = False
        self._has_limited_strings = False
        self._num_properties = 0
        self._unknown: set[str] = set()
        self._anchors: dict[str, str] = {}
        self._formats: list[dict[str, Any]] = []
        self._exclusives: list[dict[str, Any]] = []
        self._collect()
        for place, schema in list(self.schemas.items()):
            if isinstance(schema, dict):
                self._check(place, schema)
        self._resolve()
        for place, schema in list(self.schemas.items()):
            if isinstance(schema, dict):
                self._settle_alternatives(place, schema)

    def _collect(self) -> None:
        waiting: list[tuple[str, Any]] = [("#", self.root)]
        while waiting:
            place, schema = waiting.pop()
            if len(self.schemas) >= MAX_SCHEMAS:
                raise _refusal(f"The schema holds more than {MAX_SCHEMAS} schemas; send a smaller one.")
            self.schemas[place] = schema
            if isinstance(schema, dict):
                waiting += inside(place, schema)
                anchor = schema.get("$anchor")
                if isinstance(anchor, str):
                    self._anchors[anchor] = place
            elif not isinstance(schema, bool):
                raise _refusal(f"{place} is no schema: it must be an object, true or false.")

    def _check(self, place: str, schema: dict[str, Any]) -> None:
        for keyword in list(schema):
            if keyword in _HARMLESS and schema[keyword] is _HARMLESS[keyword]:
                del schema[keyword]
            else:
                self._check_keyword(place, schema, keyword)
        self._check_limits(place, schema)
        self._check_object(place, schema)
        self._check_strings(place, schema)

    def _check_keyword(self, place: str, schema: Mapping[str, Any], keyword: str) -> None:
        if keyword in ENFORCED or (keyword.startswith("x-") and keyword != "x-guidance"):
            self._check_form(place, keyword, schema[keyword])
            return
        if keyword in ANNOTATIONS:
            if keyword in ("$id", "id") and place != "#" and isinstance(schema[keyword], str):
                raise _refusal(f"{place}/{keyword}: only the whole schema can have an {keyword}.")
            if keyword == "$schema":
                self._check_draft(place, schema[keyword])
            return
        if keyword == "nullable":
            raise _refusal(f'{place}/nullable is not JSON Schema: give "null" as a further type.')
        if keyword in REFUSED or keyword == "x-guidance":
            raise _refusal(f"{place}/{keyword}: the keyword '{keyword}' is not supported, as it would not be enforced.")
        if keyword in self._unknown:
            return
        self._unknown.add(keyword)
        if len(self._unknown) > MAX_UNKNOWN:
            raise _refusal(f"The schema has more than {MAX_UNKNOWN} different keywords that JSON Schema does not know.")
        meant = difflib.get_close_matches(keyword[:40], ENFORCED | REFUSED, 1, 0.85)
        if meant:
            raise _refusal(f"{place}/{keyword}: there is no such keyword; '{meant[0]}' may be meant.")

    def _check_form(self, place: str, keyword: str, value: object) -> None:
        if keyword in (*_LIST, "enum", "required") and not isinstance(value, list):
            raise _refusal(f"{place}/{keyword} must be a list.")
        if keyword in _MAP and not isinstance(value, dict):
            raise _refusal(f"{place}/{keyword} must be an object.")

    def _check_draft(self, place: str, draft: object) -> None:
        if not isinstance(draft, str) or "json-schema.org/" not in draft or not any(name in draft for name in _DRAFTS):
            raise _refusal(f"{place}/$schema: {json.dumps(draft)[:80]} is not a draft from 4 to 2020-12.")

    def _check_limits(self, place: str, schema: Mapping[str, Any]) -> None:
        for keyword in ("anyOf", "oneOf", "allOf"):
            if len(_list(schema, keyword)) > MAX_ALTERNATIVES:
                raise _refusal(f"{place}/{keyword} has more than {MAX_ALTERNATIVES} schemas.")
        if len(_list(schema, "enum")) > MAX_VALUES:
            raise _refusal(f"{place}/enum has more than {MAX_VALUES} values.")
        for keyword in ("minItems", "minLength", "minProperties"):
            if _number(schema, keyword) > MAX_REPEATS:
                raise _refusal(f"{place}/{keyword} is more than {MAX_REPEATS}.")
        multiple = schema.get("multipleOf", 1)
        if isinstance(multiple, int | float) and multiple > 0:
            digits = repr(multiple).lower()
            whole = multiple * 10 ** len(digits.partition(".")[2]) if "e" not in digits else math.inf
            if whole > MAX_MULTIPLE:
                raise _refusal(
                    f"{place}/multipleOf: {digits} has more digits than can be enforced, which is up to {MAX_MULTIPLE}."
                )

    def _check_object(self, place: str, schema: Mapping[str, Any]) -> None:
        properties = _map(schema, "properties")
        required = _list(schema, "required")
        self._num_properties += len(properties)
        if self._num_properties > MAX_PROPERTIES:
            raise _refusal(f"The schema has more than {MAX_PROPERTIES} properties in all.")
        if len(properties.keys() - {name for name in required if isinstance(name, str)}) > MAX_OPTIONAL:
            raise _refusal(f"{place}/properties has more than {MAX_OPTIONAL} that are not required.")
        if _number(schema, "minProperties") > max(1, len(required)):
            # The library counts a name that comes twice as two properties.
            raise _refusal(
                f"{place}/minProperties is not supported where it asks for more than those required; list them there."
            )

    def _check_strings(self, place: str, schema: dict[str, Any]) -> None:
        pattern = schema.get("pattern")
        if isinstance(pattern, str):
            self.patterns.append(pattern)
            schema["pattern"] = regex.narrowed(pattern)
        self.patterns += _map(schema, "patternProperties")
        if isinstance(pattern, str) and regex.is_open(pattern):
            self.string_jump = max(self.string_jump, regex.shortest_at_most(pattern))
        limited = pattern is not None or "format" in schema or _number(schema, "minLength") > 0
        if limited or any(text.startswith('"') for text in _values(schema) or ()):
            self._has_limited_strings = True
        if "format" in schema:
            self._check_format(place, schema)

    def _check_format(self, place: str, schema: dict[str, Any]) -> None:
        name = schema["format"]
        if not isinstance(name, str):
            raise _refusal(f"{place}/format is not a string.")
        of_numbers = (name in formats.INTEGERS or name in formats.FLOATS) and "string" not in _types(schema)
        if of_numbers or name in formats.PATTERNS:
            self._formats.append(schema)
        elif name not in formats.ENFORCED:
            known = ", ".join(sorted(formats.ENFORCED))
            raise _refusal(f"{place}/format: '{name[:40]}' is not enforced; {known} are.")

    def rewrite(self) -> None:
        """Say in the library's words what it would take too loosely or not see. Places are others after it."""
        for schema in self._formats:
            name = schema.pop("format")
            if name in formats.PATTERNS:
                schema.setdefault("allOf", []).append({"pattern": formats.PATTERNS[name]})
            elif name in formats.INTEGERS:
                least, most = formats.INTEGERS[name]
                schema.setdefault("allOf", []).append({"minimum": least, "maximum": most})
        for schema in self._exclusives:
            # At most one of a oneOf can match, so that any does.
            if "anyOf" in schema:
                schema.setdefault("allOf", []).append({"anyOf": schema.pop("oneOf")})
            else:
                renamed = {"anyOf" if name == "oneOf" else name: part for name, part in schema.items()}
                schema.clear()
                schema.update(renamed)  # the order of keywords is that of properties

    def _resolve(self) -> None:
        for place, schema in list(self.schemas.items()):
            reference = schema.get("$ref") if isinstance(schema, dict) else None
            if reference is None:
                continue
            target = self._target(reference) if isinstance(reference, str) else None
            if target is None:
                raise _refusal(
                    f"{place}/$ref: {json.dumps(reference)[:80]} is not a place in this schema; only references that "
                    "begin with # are followed, and to schemas."
                )
            self.references[place] = target

    def _target(self, reference: str) -> str | None:
        reference = urllib.parse.unquote(reference)
        if reference.startswith("#") and not reference.startswith("#/") and reference != "#":
            return self._anchors.get(reference[1:])
        return reference if reference in self.schemas else None

    def _settle_alternatives(self, place: str, schema: dict[str, Any]) -> None:
        for keyword in ("anyOf", "oneOf"):
            options = _list(schema, keyword)
            if len(options) < 2:
                continue
            kinds = [self.kinds(f"{place}/{keyword}/{number}") for number in range(len(options))]
            if sum(len(kind) for kind in kinds) > len(set().union(*kinds)):
                exclusive = self._exclusive(f"{place}/{keyword}", len(options))
                self._has_mixed_alternatives |= not exclusive
                if keyword == "oneOf" and not exclusive:
                    raise _refusal(
                        f"{place}/oneOf is not supported where a value could match several of its schemas; use anyOf, "
                        'or give each a required property with a "const" of its own.'
                    )
            if keyword == "oneOf":
                self._exclusives.append(schema)

    def kinds(self, place: str) -> frozenset[str]:
        """Types that a value of the schema can have, or more of them; number stands for integer."""
        types = frozenset(_TYPES) - {"integer"}
        for seen in self.chain(place):
            schema = self.schemas[seen]
            if schema is False:
                return frozenset()
            if isinstance(schema, dict):
                types &= _types(schema)
        return types

    def chain(self, place: str) -> Iterator[str]:
        """The schema and those that it refers to, one after the other."""
        seen = set()
        at: str | None = place
        while at is not None and at not in seen:
            seen.add(at)
            yield at
            at = self.references.get(at)

    @property
    def mixes_strings(self) -> bool:
        """Whether a string may stand where by another alternative only some strings may."""
        return self._has_mixed_alternatives and self._has_limited_strings

    def _exclusive(self, place: str, count: int) -> bool:
        """Whether a property, or the value itself, tells any two of the alternatives at `place` apart."""
        places = [f"{place}/{number}" for number in range(count)]
        labels = [self._labels(at) for at in places]
        for name in labels[0]:
            if all(name in others for others in labels):
                values = [others[name] for others in labels]
                if sum(map(len, values)) == len(frozenset().union(*values)):
                    return True
        if count > _MOST_COMPARED:
            return False
        kinds = [self.kinds(at) for at in places]
        return all(
            not kinds[first] & kinds[second]
            or any(not values & labels[second].get(name, values) for name, values in labels[first].items())
            for first in range(count)
            for second in range(first)
        )

    def _labels(self, place: str) -> dict[str, frozenset[str]]:
        """Required properties of an object that can have only some values -> these as JSON; "" is the value itself."""
        labels: dict[str, frozenset[str]] = {}
        for seen in self.chain(place):
            schema = self.schemas[seen]
            if not isinstance(schema, dict):
                continue
            own = _values(schema)
            if own is not None:
                labels[""] = own
            if _types(schema) == {"object"}:
                properties = _map(schema, "properties")
                for name in _list(schema, "required"):
                    part = properties.get(name) if isinstance(name, str) else None
                    values = _values(part) if isinstance(part, dict) else None
                    if values is not None:
                        labels[f"/{name}"] = values
        return labels


@dataclass(frozen=True)
class _Formula:
    """The size of a schema's shortest text: `kinds` is what each type that it may have needs, as (bytes, parts times a
    number); to it come `added` and the smallest of each of `options`. Parts are places of schemas."""

    kinds: list[tuple[int, list[tuple[str, int]]]]
    added: list[str]
    options: list[list[str]]
    any_kind: bool
    """Which type it is is said elsewhere: any may be it."""

    def size(self, sizes: Mapping[str, int]) -> int:
        own = [fixed + sum(sizes[part] * times for part, times in parts) for fixed, parts in self.kinds]
        total = max(own, default=0) if self.any_kind else min(own, default=0)
        total += sum(sizes[part] for part in self.added)
        total += sum(min(sizes[part] for part in parts) for parts in self.options)
        return min(regex.MOST, total)

    @property
    def work(self) -> int:
        return 1 + len(self.added) + sum(map(len, self.options)) + sum(len(parts) for _, parts in self.kinds)


class _Sizes:
    """How many bytes the shortest text of each schema has at most; regex.MOST where none was found."""

    def __init__(self, walk: _Walk) -> None:
        self._walk = walk
        self._sizes: dict[str, int] = dict.fromkeys(walk.schemas, regex.MOST)
        self._settle()

    def _settle(self) -> None:
        """Sizes only fall, from the schemas that hold no other up. A round follows references by one step or more."""
        formulas = {place: self._formula(place) for place in reversed(self._walk.schemas)}  # what is inside is first
        work = 0
        changed = True
        while changed and work < _MAX_WORK:
            changed = False
            for place, formula in formulas.items():
                size = formula.size(self._sizes)
                work += formula.work
                if size < self._sizes[place]:
                    self._sizes[place] = size
                    changed = True

    def jump(self) -> int:
        """What one token may add: it may take up several alternatives, one inside the other."""
        most = 1
        for place, schema in self._walk.schemas.items():
            if isinstance(schema, dict):
                most = max([most, *self._choices(place, schema)])
        return 2 * most + 12

    def _choices(self, place: str, schema: Mapping[str, Any]) -> Iterator[int]:
        for at, _ in inside(place, schema, ("anyOf", "oneOf", "items", "prefixItems", "additionalItems")):
            yield self._sizes[at]
        required = _list(schema, "required")
        for name in _map(schema, "properties"):
            if name not in required:
                yield self._sizes[f"{place}/properties/{_escaped(name)}"] + len(name.encode()) + 6
        for at, _ in inside(place, schema, ("patternProperties", "additionalProperties")):
            yield self._sizes[at] + 8
        yield max((len(value.encode()) for value in _values(schema) or ()), default=0)
        yield _pattern_size(schema)

    def _formula(self, place: str) -> _Formula:
        schema = self._walk.schemas[place]
        if not isinstance(schema, dict):
            return _Formula([(1, [])], [], [], any_kind=False)
        values = _values(schema)
        if values is not None:
            return _Formula([(max((len(value.encode()) for value in values), default=0), [])], [], [], any_kind=False)
        added = [at for at, _ in inside(place, schema, ("allOf",))]
        if place in self._walk.references:
            added.append(self._walk.references[place])
        options = [[at for at, _ in inside(place, schema, (keyword,))] for keyword in ("anyOf", "oneOf")]
        own: dict[str, tuple[int, list[tuple[str, int]]]] = {
            "null": (4, []),
            "boolean": (4, []),
            "number": (1 + sum(_digits(schema.get(name)) for name in ("minimum", "maximum", "multipleOf")), []),
            "string": (2 + int(_number(schema, "minLength")) + _pattern_size(schema), []),
            "array": self._array(place, schema),
            "object": self._object(place, schema),
        }
        kinds = [own[kind] for kind in _types(schema)]
        return _Formula(kinds, added, [parts for parts in options if parts], any_kind="type" not in schema)

    def _array(self, place: str, schema: Mapping[str, Any]) -> tuple[int, list[tuple[str, int]]]:
        count = int(_number(schema, "minItems"))
        parts = [(at, 1) for at, _ in inside(place, schema, ("prefixItems",))][:count]
        if count > len(parts):
            parts += [(at, count - len(parts)) for at, _ in inside(place, schema, ("items",))]
        return 2 + 3 * count, parts

    def _object(self, place: str, schema: Mapping[str, Any]) -> tuple[int, list[tuple[str, int]]]:
        fixed = 2 + 8 * int(_number(schema, "minProperties"))
        parts: list[tuple[str, int]] = []
        for name in _list(schema, "required"):
            if isinstance(name, str):
                fixed += len(json.dumps(name).encode()) + 4
                for at in (f"{place}/properties/{_escaped(name)}", f"{place}/additionalProperties"):
                    if at in self._sizes:
                        parts.append((at, 1))
                        break
        return fixed, parts


def inside(place: str, schema: Mapping[str, Any], keywords: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """-> the schemas directly inside one, at these keywords or at all, each with its place."""
    for keyword in keywords or schema:
        value = schema.get(keyword)
        if keyword in _MAP and isinstance(value, dict):
            for name, part in value.items():
                yield f"{place}/{keyword}/{_escaped(name)}", part
        elif (keyword in _LIST or keyword == "items") and isinstance(value, list):
            for number, part in enumerate(value):
                yield f"{place}/{keyword}/{number}", part
        elif keyword in _ONE and value is not None:
            yield f"{place}/{keyword}", value


def _escaped(name: str) -> str:
    """A step of a JSON pointer (RFC 6901, section 3)."""
    return name.replace("~", "~0").replace("/", "~1")


def _types(schema: Mapping[str, Any]) -> frozenset[str]:
    types = schema.get("type", _TYPES)
    listed = [types] if isinstance(types, str) else types if isinstance(types, list | tuple) else []
    return frozenset("number" if name == "integer" else name for name in listed if name in _TYPES)


def _values(schema: Mapping[str, Any]) -> frozenset[str] | None:
    """Those of `const` or `enum`, as JSON in one spelling; None without them."""
    if "const" in schema:
        return frozenset({_spelled(schema["const"])})
    if isinstance(schema.get("enum"), list):
        return frozenset(_spelled(value) for value in schema["enum"])
    return None


def _spelled(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True)


def _list(schema: Mapping[str, Any], keyword: str) -> list[Any]:
    value = schema.get(keyword)
    return value if isinstance(value, list) else []


def _map(schema: Mapping[str, Any], keyword: str) -> dict[str, Any]:
    value = schema.get(keyword)
    return value if isinstance(value, dict) else {}


def _number(schema: Mapping[str, Any], keyword: str) -> float:
    value = schema.get(keyword)
    return value if isinstance(value, int | float) else 0


def _digits(value: object) -> int:
    return len(format(value, ".20f")) if isinstance(value, int | float) else 0


def _pattern_size(schema: Mapping[str, Any]) -> int:
    size = 64 if "format" in schema else 0
    pattern = schema.get("pattern")
    return size + regex.shortest_at_most(pattern) if isinstance(pattern, str) else size
