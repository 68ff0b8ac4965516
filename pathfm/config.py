"""A verb's config out of one YAML file and ``--dotted.key value`` overrides, strictly.

Both end up in one nested dict that the verb's own pydantic model validates, so a value means the
same in a file and on the command line, and a mistake is told in the same words: an unknown key
names its nearest neighbour, a wrong value names the field, the value and the bound. tyro renders
the help; it does not parse, because its errors are boxes of several lines and a YAML file would
still need a second way to complain.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from pathfm.runtime import PathfmError

Model = TypeVar("Model", bound=BaseModel)

_COMMAND = re.compile(r"#\s+(pathfm [a-z]\S* \S.*)")
_MOST_KEYS = 30  # in a line of those that are known
_NONE_WORDS = {"none", "null"}


def load_config(
    model: type[Model],
    yaml_path: Path | None = None,
    arguments: Sequence[str] = (),
    positional: Sequence[str] = (),
) -> Model:
    """The validated config: the model's defaults, then the YAML, then the command line.

    ``positional`` names the fields that bare words fill, in order; a field that takes many takes
    all the words left. Raises ``PathfmError`` on anything the model does not know or allow.
    """
    values: dict[str, Any] = read_yaml(yaml_path) if yaml_path is not None else {}
    merge(values, parse_arguments(model, arguments, positional))
    try:
        return model.model_validate(values)
    except ValidationError as error:
        where = f" (in {yaml_path} or on the command line)" if yaml_path is not None else ""
        meant = _meant_for(yaml_path) if error.errors()[0]["type"] == "extra_forbidden" else ""
        raise PathfmError(explain(model, error) + where + meant) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping a YAML file holds; ``PathfmError`` with the line where it is no YAML."""
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.load(text, Loader=_OneValueEach)  # noqa: S506
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a UTF-8 text file"
        raise PathfmError(f"config {path}: {reason}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "unreadable"
        raise PathfmError(f"config {path}{line}: not valid YAML: {problem}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise PathfmError(
            f"config {path}: wants `key: value` lines, found a {type(values).__name__}"
        )
    return values


def _meant_for(path: Path | None) -> str:
    """What the first comment of a YAML file that has a `pathfm VERB ...` says it is for."""
    lines = path.read_text(encoding="utf-8").splitlines() if path is not None else []
    told = [found for line in lines if (found := _COMMAND.match(line))]
    return f". The file says: {told[0][1]}" if told else ""


class _OneValueEach(yaml.SafeLoader):
    """A mapping that says a key twice is refused; YAML would take the last, unsaid."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is there twice", key.start_mark
                )
            seen.add((key.tag, key.value))
        return node


def merge(base: dict[str, Any], over: Mapping[str, Any]) -> None:
    """Lays ``over`` onto ``base`` in place; nested mappings are merged key by key."""
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            merge(base[key], value)
        else:
            base[key] = value


def parse_arguments(
    model: type[BaseModel], arguments: Sequence[str], positional: Sequence[str] = ()
) -> dict[str, Any]:
    """Command-line words as a nested dict of strings and lists of strings, keyed like the YAML."""
    known = dict(fields(model))
    words = list(arguments)
    bare: list[str] = []
    values: dict[str, Any] = {}
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            bare.append(word)
            continue
        flag, equals, inline = word[2:].partition("=")
        key, negated = _known_key(flag, known)
        annotation = known[key]
        if negated or (_is_flag(annotation) and not equals and not _next_is_bool(words)):
            value: Any = not negated
        elif _takes_many(annotation):
            value = [inline] if equals else _take_values(words)
        elif equals or words:
            value = inline if equals else words.pop(0)
        else:
            raise PathfmError(f"--{key} wants a value")
        _put(values, key, _none_aware(annotation, value))
    for name in positional:
        if bare:
            many = _takes_many(known[name])
            _put(values, name, bare if many else bare[0])
            bare = [] if many else bare[1:]
    if bare:
        raise PathfmError(f"{bare[0]!r} is not expected here: options are written --key value")
    return values


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, annotation) of every leaf field, nested models opened."""
    for name, field in model.model_fields.items():
        inner = [part for part in _alternatives(field.annotation) if _is_model(part)]
        if not inner:
            yield f"{prefix}{name}", field.annotation
        for part in inner:
            yield from fields(part, f"{prefix}{name}.")


def explain(model: type[BaseModel], error: ValidationError) -> str:
    """The first mistake pydantic found, as one line: field, value, bound, remedy."""
    first, *others = error.errors()
    known = dict(fields(model))
    names = list(known)
    key = _trim(first["loc"], names)
    given = first["input"]
    counted = first["type"] in ("missing", "too_long") and isinstance(given, (list, tuple))
    if counted and (wanted := _lengths(known.get(key))):
        return f"{key} = {', '.join(map(str, given))}: wants {wanted} values, {len(given)} given"
    if first["type"] == "missing":
        return f"{key} is required: give --{key} VALUE, or {key.rpartition('.')[2]}: in the YAML"
    if first["type"] == "extra_forbidden":
        return unknown_key(".".join(map(str, first["loc"])), names)
    # the branches of a union complain one by one about the same field
    said = [first["msg"], *(o["msg"] for o in others if _trim(o["loc"], names) == key)]
    what = " or ".join(dict.fromkeys(_reword(message) for message in said))
    if not key:
        return what
    if key not in known and isinstance(given, Mapping):  # of a whole group: its reason says enough
        return f"{key}: {what}"
    return f"{key} = {given if isinstance(given, (int, float)) else repr(given)}: {what}"


def unknown_key(key: str, known: Iterable[str]) -> str:
    """``unknown key ...`` with the nearest known one, by whole key and by last word."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:  # `--lr` for `--optim.lr`
        last = {name.rpartition(".")[2]: name for name in known}
        near = [last[m] for m in difflib.get_close_matches(key.rpartition(".")[2], last, n=1)]
    more = f" and {len(known) - _MOST_KEYS} more (--help)" if len(known) > _MOST_KEYS else ""
    there = f"known: {', '.join(known[:_MOST_KEYS])}{more}"
    hint = f"did you mean {near[0]!r}?" if near else there
    return f"unknown key {key!r}: {hint}"


def _known_key(flag: str, known: Mapping[str, Any]) -> tuple[str, bool]:
    """The field a flag names, and whether it is a ``--no-`` form."""
    key = flag.replace("-", "_")
    if key in known:
        return key, False
    head, _, last = key.rpartition(".")
    if last.startswith("no_"):
        positive = f"{head}.{last[3:]}" if head else last[3:]
        if positive in known and _is_flag(known[positive]):
            return positive, True
    raise PathfmError(unknown_key(key, known))


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union (one for a plain type), ``Annotated`` taken off."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _alternatives(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [part for arm in get_args(annotation) for part in _alternatives(arm)]
    return [annotation]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _takes_many(annotation: Any) -> bool:
    return any(
        get_origin(part) in (list, tuple, set, frozenset, Sequence)
        for part in _alternatives(annotation)
    )


def _lengths(annotation: Any) -> str:
    """How many values a field takes ("2", "2 or 3"); empty where any number will do."""
    tuples = [get_args(part) for part in _alternatives(annotation) if get_origin(part) is tuple]
    return " or ".join(str(len(items)) for items in tuples if Ellipsis not in items)


def _is_flag(annotation: Any) -> bool:
    return bool in _alternatives(annotation)


def _next_is_bool(words: Sequence[str]) -> bool:
    return bool(words) and words[0].lower() in {"true", "false", "yes", "no", "on", "off", "0", "1"}


def _take_values(words: list[str]) -> list[str]:
    taken: list[str] = []
    while words and not words[0].startswith("--"):
        taken.append(words.pop(0))
    return taken


def _none_aware(annotation: Any, value: Any) -> Any:
    """``None`` for the word "none" where the field allows it; one value for ``X | list[X]``."""
    parts = _alternatives(annotation)
    word = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(word, str) and word.lower() in _NONE_WORDS and type(None) in parts:
        return None
    scalar = any(part in (int, float, str, Path) for part in parts)
    return word if scalar else value


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for name in path:
        values = values.setdefault(name, {})
    values[last] = value


def _trim(loc: Sequence[int | str], names: Iterable[str]) -> str:
    """The longest leading part of an error's location that is a field or a group of fields."""
    known = set(names) | {
        ".".join(parts[:i])
        for name in names
        for parts in [name.split(".")]
        for i in range(len(parts))
    }
    key = ""
    for part in loc:
        longer = f"{key}.{part}" if key else str(part)
        if longer in known:
            key = longer
    return key or ".".join(map(str, loc))


def _reword(message: str) -> str:
    return message.removeprefix("Value error, ").replace("Input should be", "should be")
