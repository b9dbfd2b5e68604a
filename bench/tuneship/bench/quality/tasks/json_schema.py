"""`json-schema`: the answer is JSON that a schema allows, whatever its values.

The schema is the row's key `schema` (an object, or its text), or the file that the option `schema` names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from tuneship.bench.quality.tasks.text import unfence


def score_json_schema(answer: str, reference: str, extra: Mapping[str, Any]) -> float:
    """1.0 when `answer` (a code fence is tolerated) is valid, else 0.0.

    Raises:
        ValueError: no schema, or none that can be used, or the reference is not valid.

    """
    from referencing.exceptions import Unresolvable  # noqa: PLC0415 - few tasks need it

    validator = _validator(_schema_text(extra.get("schema")))
    try:
        if not _valid(validator, reference):
            raise ValueError("the schema does not allow the reference")
        return float(_valid(validator, unfence(answer)))
    except Unresolvable as error:
        raise ValueError(f"the schema refers to what is not in it: {error}") from None


def _valid(validator: Any, text: str) -> bool:
    try:
        return bool(validator.is_valid(json.loads(text)))
    except (json.JSONDecodeError, RecursionError):
        return False


def _schema_text(schema: Any) -> str:
    if isinstance(schema, dict):
        return json.dumps(schema)
    if not isinstance(schema, str) or not schema:
        raise ValueError("neither the row nor the task's options have a 'schema'")
    if schema.lstrip().startswith("{"):
        return schema
    try:
        return Path(schema).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"schema: {error}") from None


@lru_cache(maxsize=64)
def _validator(text: str) -> Any:
    from jsonschema import SchemaError, validators  # type: ignore[import-untyped]  # noqa: PLC0415
    from referencing import Registry  # noqa: PLC0415

    schema = json.loads(text)
    cls = validators.validator_for(schema, default=validators.validator_for({}))
    try:
        cls.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"not a JSON schema: {error.message}") from None
    return cls(schema, registry=Registry())  # an empty one: nothing is fetched from the network
