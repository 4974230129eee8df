"""A JSON schema as llguidance takes it, without a change to what satisfies it.

Formats that JSON Schema leaves to the application are annotations and go; `oneOf` whose branches
cannot overlap is `anyOf`. What cannot be enforced is refused: an answer always validates.
"""

from collections.abc import Mapping
from itertools import combinations

Schema = Mapping[str, object]

ENFORCED_FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"}
)
_LITERAL = frozenset({"const", "enum", "default", "examples"})  # values, not schemas
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_MAX_REFS = 32  # followed in a row
_MAX_BRANCHES = 64


def normalised(schema: object) -> dict[str, object]:
    """Return an equivalent schema. Raises ValueError for one that nothing satisfies or enforces."""
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise ValueError("nothing satisfies this schema")
    result = _node(schema, schema)
    assert isinstance(result, dict)
    return result


def rebased(schema: object, base: str) -> object:
    """Return a schema as it reads once the document that it refers to lies at `base`."""
    if isinstance(schema, list):
        return [rebased(item, base) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result: dict[str, object] = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):
            result[key] = {name: rebased(item, base) for name, item in value.items()}
        elif key in _LITERAL:
            result[key] = value
        elif key == "$ref" and isinstance(value, str) and value.startswith("#"):
            result[key] = base + value[1:]
        else:
            result[key] = rebased(value, base)
    return result


def _node(node: object, root: Schema) -> object:
    if isinstance(node, list):
        return [_node(item, root) for item in node]
    if not isinstance(node, dict):
        return node
    result: dict[str, object] = {}
    for key, value in node.items():
        if key in _NAMED and isinstance(value, dict):
            result[key] = {name: _node(item, root) for name, item in value.items()}
        elif key in _LITERAL:
            result[key] = value
        elif key == "format" and isinstance(value, str) and value not in ENFORCED_FORMATS:
            continue
        else:
            result[key] = _node(value, root)
    branches = node.get("oneOf")
    if isinstance(branches, list) and "anyOf" not in node:
        if len(branches) > _MAX_BRANCHES:
            raise ValueError(f"oneOf has more than {_MAX_BRANCHES} branches")
        resolved = [_resolve(branch, root) for branch in branches]
        if not all(_are_disjoint(a, b, root) for a, b in combinations(resolved, 2)):
            raise ValueError("oneOf whose branches may overlap cannot be enforced; use anyOf")
        result["anyOf"] = result.pop("oneOf")
        result.pop("discriminator", None)  # OpenAPI's, says nothing more
    return result


def _resolve(node: object, root: Schema) -> Schema:
    """Follow local references as far as they lead."""
    for _ in range(_MAX_REFS):
        target = node.get("$ref") if isinstance(node, dict) else None
        if not isinstance(target, str) or not target.startswith("#/"):
            break
        node = root
        for part in target[2:].split("/"):
            name = part.replace("~1", "/").replace("~0", "~")
            node = node.get(name) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}


def _are_disjoint(a: Schema, b: Schema, root: Schema) -> bool:
    """Say whether no value can satisfy both, as far as types and constants show it."""
    types, others = _types(a), _types(b)
    if types and others and not types & others:
        return True
    values, other_values = _values(a), _values(b)
    if values is not None and other_values is not None:
        return not any(value in other_values for value in values)
    if types == others == {"object"}:
        return any(
            _are_disjoint(_resolve(mine, root), _resolve(theirs, root), {})
            for mine, theirs in _shared_required(a, b)
        )
    return False


def _types(node: Schema) -> frozenset[str]:
    names = node.get("type")
    listed = names if isinstance(names, list) else [names]
    found = frozenset(name for name in listed if isinstance(name, str))
    # An integer is a number too.
    return found | {"integer"} if "number" in found else found


def _values(node: Schema) -> list[object] | None:
    if "const" in node:
        return [node["const"]]
    enum = node.get("enum")
    return enum if isinstance(enum, list) else None


def _shared_required(a: Schema, b: Schema) -> list[tuple[object, object]]:
    """Return the schemas of the properties that both must have."""
    mine, theirs = a.get("properties"), b.get("properties")
    required, others = a.get("required"), b.get("required")
    if not (isinstance(mine, dict) and isinstance(theirs, dict)):
        return []
    if not (isinstance(required, list) and isinstance(others, list)):
        return []
    return [
        (mine[name], theirs[name])
        for name in mine.keys() & theirs.keys()
        if name in required and name in others
    ]
