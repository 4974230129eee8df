"""An OpenAPI document as JSON schemas: what it has to say of a field, examples of its values.

Knows nothing of this server. `nullable` is read as its authors mean it, though the document calls
itself 3.1, where the word has no meaning: null is allowed.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jsonschema

OPENAI = Path(__file__).resolve().parents[3] / "shared" / "data" / "openai-openapi.json"
Schema = dict[str, object]


@dataclass(frozen=True)
class Absent:
    """The value of a field that is not sent."""


ABSENT = Absent()


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A value for a field, or for a part of it; `against` differs from it in that part alone."""

    path: str
    leaf: object  # what stands at the path
    value: object  # of the whole field
    against: object = ABSENT


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """What an answer has where the document wants something else."""

    path: str
    found: str


class Document:
    """The schemas of one OpenAPI document."""

    def __init__(self, content: dict) -> None:
        self.version: str = content["info"]["version"]
        self._components = {"schemas": _with_nulls(content["components"]["schemas"])}

    @classmethod
    def read(cls, path: Path = OPENAI) -> "Document":
        return cls(json.loads(path.read_text("utf-8")))

    def deviations(self, value: object, name: str) -> set[Deviation]:
        """Return what a schema's own validator says against an answer."""
        schema = {"$ref": f"#/components/schemas/{name}", "components": self._components}
        validator = jsonschema.Draft202012Validator(schema)
        return {
            Deviation(path=joined(leaf.absolute_path), found=_told(leaf.instance))
            for error in validator.iter_errors(value)
            for leaf in _leaves(error)
        }

    def properties(self, name: str) -> dict[str, Schema]:
        """Return the fields of an object; those of all its parts together."""
        return self._properties(self._components["schemas"][name])

    def paths(self, name: str) -> dict[str, bool]:
        """Return each path that an answer may have, and whether what is below it has free names."""
        found: dict[str, bool] = {}
        self._walk(self._components["schemas"][name], "", found)
        return found

    def samples(self, path: str, schema: Schema, hints: dict[str, object]) -> Iterator[Sample]:
        """Yield values of each kind that a schema allows, the first one the plainest.

        A hint is the value to take at a path where the schema allows anything.
        """
        if path in hints:
            yield _plain(path, hints[path])
            return
        schema = self._resolved(schema)
        branches = schema.get("oneOf") or schema.get("anyOf")
        if isinstance(branches, list):
            for branch in branches:
                yield from self.samples(path + self._mark(branch), branch, hints)
        elif "const" in schema or "enum" in schema:
            for value in [schema["const"]] if "const" in schema else schema["enum"]:
                yield _plain(path, value)
        elif schema.get("type") == "array":
            for item in self.samples(path, schema.get("items", {}), hints):
                against = item.against
                against = against if against is ABSENT else [against]
                yield replace(item, value=[item.value], against=against)
        elif schema.get("type") == "object" or "properties" in schema or "allOf" in schema:
            yield from self._objects(path, schema, hints)
        else:
            for value in _scalars(schema):
                yield _plain(path, value)

    def _objects(self, path: str, schema: Schema, hints: dict[str, object]) -> Iterator[Sample]:
        properties = self._properties(schema)
        free = schema.get("additionalProperties")
        if not properties:
            inner = next(self.samples(path, free, hints)).value if isinstance(free, dict) else None
            yield _plain(path, {} if inner is None else {"1": inner})
            return
        required = schema.get("required", [])
        inside = {
            name: list(self.samples(f"{path}.{name}", properties[name], hints))
            for name in properties
        }
        plain = {name: inside[name][0].value for name in required}
        yield _plain(path, plain)
        for name, samples in inside.items():
            rest = samples[1:] if name in required else samples
            for sample in rest:
                if sample.leaf is None and name not in required:
                    continue
                against: object = plain if name not in required else ABSENT
                if sample.against is not ABSENT:
                    against = {**plain, name: sample.against}
                yield replace(sample, value={**plain, name: sample.value}, against=against)

    def _mark(self, branch: Schema) -> str:
        """Return what tells a branch from its neighbours: its type or role in brackets."""
        for name, schema in self._properties(branch).items():
            schema = self._resolved(schema)
            only = schema.get("enum", [schema["const"]] if "const" in schema else [])
            if name in ("type", "role") and len(only) == 1:
                return f"[{only[0]}]"
        return ""

    def _properties(self, schema: Schema) -> dict[str, Schema]:
        schema = self._resolved(schema)
        found = dict(schema.get("properties", {}))
        for part in schema.get("allOf", []):
            found |= self._properties(part)
        return found

    def _resolved(self, schema: Schema) -> Schema:
        while isinstance(ref := schema.get("$ref"), str):
            schema = self._components["schemas"][ref.removeprefix("#/components/schemas/")]
        return schema

    def _walk(self, schema: Schema, path: str, found: dict[str, bool]) -> None:
        schema = self._resolved(schema)
        for branch in [*schema.get("anyOf", []), *schema.get("oneOf", [])]:
            self._walk(branch, path, found)
        if "items" in schema:
            self._walk(schema["items"], f"{path}.*" if path else "*", found)
        if path:
            has_names = bool(schema.get("additionalProperties"))
            found[path] = found.get(path, False) or has_names
        for name, inner in self._properties(schema).items():
            self._walk(inner, f"{path}.{name}" if path else name, found)


def joined(path) -> str:
    """Return a path with * for places in lists."""
    return ".".join("*" if isinstance(part, int) else str(part) for part in path)


def paths_in(value: object, path: str = "") -> Iterator[tuple[str, bool]]:
    """Yield the paths of an answer and whether there is a null."""
    if path:
        yield path, value is None
    prefix = f"{path}." if path else ""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from paths_in(inner, f"{prefix}{name}")
    elif isinstance(value, list):
        for inner in value:
            yield from paths_in(inner, f"{prefix}*")


def _plain(path: str, value: object) -> Sample:
    return Sample(path=path, leaf=value, value=value)


def _scalars(schema: Schema) -> list[object]:
    """Return values of a plain type, with the ends of its range."""
    kind = schema.get("type")
    if kind == "boolean":
        return [True, False]
    if kind in ("integer", "number"):
        low, high = schema.get("minimum"), schema.get("maximum")
        ends = [value for value in (low, high) if value is not None]
        if "exclusiveMinimum" in schema:
            ends = [value for value in ends if value is not low]
        inside = schema.get("exclusiveMaximum")
        ends += [0.5] if kind == "number" else []
        return [1, *(value for value in ends if value != 1), *([inside - 1] if inside else [])]
    return [None] if kind == "null" else ["a"]


def _with_nulls(node):
    """Return schemas in which `nullable` is spelled out."""
    if isinstance(node, list):
        return [_with_nulls(item) for item in node]
    if not isinstance(node, dict):
        return node
    schema = {name: _with_nulls(value) for name, value in node.items() if name != "nullable"}
    return {"anyOf": [schema, {"type": "null"}]} if node.get("nullable") is True else schema


def _leaves(error: jsonschema.ValidationError) -> Iterator[jsonschema.ValidationError]:
    """Yield the faults furthest in: of several branches, those of the one that fits best."""
    if not error.context:
        yield error
        return
    deepest = max(len(inner.absolute_path) for inner in error.context)
    if deepest == len(error.absolute_path):
        yield error
        return
    for inner in error.context:
        if len(inner.absolute_path) == deepest:
            yield from _leaves(inner)


def _told(value: object) -> str:
    if value is None:
        return "null"
    return json.dumps(value, ensure_ascii=False)[:80]
