"""Strict configuration files: YAML for pydantic models, and errors that name the file and the nearest key."""

from __future__ import annotations

import difflib
import functools
import reprlib
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from llava_core.registry import unknown
from llava_core.runtime import ConfigError, DataError, display_path, read_text


class StrictModel(BaseModel):
    """An immutable pydantic model that refuses unknown keys and infinite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


MAX_BYTES = 10**6
"""Of a YAML file; PyYAML reads that much in about 3 s."""

M = TypeVar("M", bound=StrictModel)


class _Loader(yaml.SafeLoader):
    """YAML in which a key written twice is an error, not a silent choice of the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is written twice", node.start_mark)
            if isinstance(key, Hashable):  # for another key PyYAML raises an error
                seen.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; a ValueError says what is wrong, and in which line if that is known."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{line}not valid YAML ({error.problem})") from error
    except Exception as error:  # PyYAML raises RecursionError, KeyError, AttributeError and others
        raise ValueError(f"not valid YAML ({' '.join(str(error).split())[:200] or type(error).__name__})") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file with a mapping at its top level; anything else is a ConfigError."""
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{display_path(path)}: more than {MAX_BYTES:,} bytes; is it the right file?")
    try:
        content = parse_yaml(read_text(path))
    except DataError as error:
        raise ConfigError(str(error)) from error
    except ValueError as error:
        place = ", " if str(error).startswith("line ") else ": "
        raise ConfigError(f"{display_path(path)}{place}{error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{display_path(path)}: expected `key: value` lines")
    return content


def _section(model: type[BaseModel], field: str) -> type[BaseModel] | None:
    """The model of a field that is a section of the file."""
    kind = model.model_fields[field].annotation if field in model.model_fields else None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


@functools.cache
def field_names(model: type[BaseModel]) -> tuple[str, ...]:
    """Return the dotted names of all fields of a model."""
    names: list[str] = []
    for field in model.model_fields:
        inner = _section(model, field)
        names += [f"{field}.{name}" for name in field_names(inner)] if inner else [field]
    return tuple(names)


def check_field(model: type[BaseModel], field: str, where: str) -> None:
    """Raise ConfigError with the nearest field if `model` has no field of this dotted name."""
    known = field_names(model)
    if field in known:
        return
    # the last part alone is what people mistype, so `lerning_rate` finds `train.learning_rate`
    ends = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(field, known, n=1, cutoff=0.6)
    near = near or [ends[end] for end in difflib.get_close_matches(field.rpartition(".")[2], ends, n=1, cutoff=0.5)]
    guess = f"; did you mean '{near[0]}'?" if near else f" (known: {', '.join(known)})"
    raise ConfigError(f"{where}: unknown key '{field}'{guess}")


def flatten(model: type[BaseModel], content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a file's values by dotted name; unknown keys are errors. A section has no sections of its own."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if _section(model, key) is None:
            flat[key] = value
        elif isinstance(value, Mapping):
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            raise ConfigError(f"{where}: '{key}' is a section and needs `key: value` lines below it")
    for field in flat:
        check_field(model, field, where)
    return flat


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by dotted name as a dict with a dict per section."""
    content: dict[str, Any] = {}
    for field, value in flat.items():
        section, _, name = field.rpartition(".")
        target = content.setdefault(section, {}) if section else content
        target[name] = value
    return content


def value_of(model: BaseModel, field: str) -> Any:
    return functools.reduce(getattr, field.split("."), model)


def validated(model: type[M], content: Mapping[str, Any], where: str, origin: Mapping[str, str] | None = None) -> M:
    """Return a model of nested dicts; an error names the file `where`, or the `origin` of the dotted field."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        # an unknown key first: it explains the one that is missing
        first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
        field = ".".join(str(part) for part in first["loc"])
        where = (origin or {}).get(field, where)
        if first["type"] == "extra_forbidden":
            key, known = _key_and_known(model, first["loc"])
            raise ConfigError(f"{where}: {unknown('key', key, known)}") from None
        given = "" if first["type"] == "missing" else f" (it is {_shown(first['input'])})"
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}: {field}: {message}{given}") from None


def _shown(value: Any) -> str:
    """A value for a message, without the inside of nested ones: references of YAML make small texts large."""
    return repr(value)[:200] if not isinstance(value, list | dict) else reprlib.repr(value)


def _key_and_known(model: type[BaseModel], place: tuple[int | str, ...]) -> tuple[str, Mapping[str, Any]]:
    """An unknown key and the fields of its section; outside a section the dotted key and the fields of the file."""
    part: type[BaseModel] | None = model
    for name in place[:-1]:
        annotation = part.model_fields[str(name)].annotation if part and name in part.model_fields else None
        kinds = get_args(annotation) or (annotation,)  # such as those of `Model | None`
        part = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return (str(place[-1]), part.model_fields) if part else (".".join(map(str, place)), model.model_fields)
