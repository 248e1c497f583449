"""One YAML file an experiment: `base:` files, dotted overrides, strict keys and types, and where each value came from.

The schema is a tree of frozen dataclasses that the rooms define; this module knows only how to fill such a tree.

    base: [recipe.yaml]        # one path or several, relative to this file; later ones win, lists are replaced whole
    train: {steps: 10k}        # counts may be written 10k, 1.5M, 2B; durations 90s, 30min, 2h

`load` returns the tree and the source of every value. A wrong key or type is a `ConfigError` that names the file, the
key, the value and the nearest key that exists. A dataclass may define `check(self, path)` for rules of its own.
"""

import ast
import dataclasses
import difflib
import inspect
import io
import json
import re
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml

from launch.errors import ConfigError

T = TypeVar("T")

Count = Annotated[int, "count"]  # accepts 10k, 1.5M, 2B
Seconds = Annotated[float, "duration"]  # accepts 90s, 30min, 2h

_COUNT_UNITS = {"k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_SECOND_UNITS = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def load(schema: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> tuple[T, dict[str, str]]:
    """The configuration in `path` with `overrides` ("a.b=3") applied, and the source of each value by dotted key.

    Without a path all but the overrides is left to the schema.
    """
    sources: dict[str, str] = {}
    tree = read_tree(path, overrides, sources)
    return _checked(schema, tree, sources), sources


def from_dict(schema: type[T], tree: dict[str, Any], *, source: str) -> T:
    """The configuration in plain data, as `to_dict` made it; `source` is named in errors."""
    return _checked(schema, tree, {key: source for key in flatten(tree)})


def check(config: Any) -> None:
    """`ConfigError` if a section, or the whole, breaks a rule of its own."""
    for dotted, node in _dataclasses_in(config, ""):
        if hasattr(node, "check"):
            node.check(dotted)


def read_yaml(path: str | Path, sources: dict[str, str] | None = None) -> dict[str, Any]:
    """The mapping in `path` with its `base:` files merged beneath it; fills `sources` with dotted key -> file."""
    return _read_yaml(Path(path), {} if sources is None else sources, ())


def read_tree(
    path: str | Path | None, overrides: Sequence[str] = (), sources: dict[str, str] | None = None
) -> dict[str, Any]:
    """`read_yaml` with the overrides applied: the plain data of an experiment whose schema need not be at hand."""
    sources = {} if sources is None else sources
    tree = {} if path is None else read_yaml(path, sources)
    for text in overrides:
        _apply_override(tree, text, sources)
    return tree


def run_folder(path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Where the run of this configuration lives, without knowing the room's schema."""
    section = read_tree(path, overrides).get("run") or {}
    return Path(str(section.get("dir") or f"runs/{section.get('name') or 'run'}"))


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`under` itself, with the values of `over` in place of its own; mappings are merged, all else is replaced."""
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(under.get(key), dict):
            merge(under[key], value)
        else:
            under[key] = value
    return under


def entry_module(path: str | Path) -> str:
    """The training module of the room that an experiment names."""
    entry = read_yaml(path).get("entry")
    if not isinstance(entry, str) or not re.fullmatch(r"[a-z_]+(\.[a-z_]+)*\.train", entry):
        raise ConfigError(f"{path}: entry = {entry!r}; it names the room's training module, for example llm.train")
    return entry


def override(key: str, value: Any) -> str:
    """The override that sets `key` to `value`, whatever characters are in it (JSON is YAML)."""
    is_plain = isinstance(value, str) and _is_plain(value)
    return f"{key}={value if is_plain else json.dumps(value, ensure_ascii=False)}"


def to_dict(config: Any) -> dict[str, Any]:
    """Plain data of a configuration tree, ready for YAML or JSON (tuples become lists)."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return value

    return plain(config)


def dump(config: Any) -> str:
    """The resolved configuration as YAML that `load` reads back to an equal tree."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, width=120)


def difference(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old, new) for every leaf that differs between two plain trees; a missing one shows as None."""
    flat_old, flat_new = flatten(old), flatten(new)
    keys = sorted(flat_old.keys() | flat_new.keys())
    return {k: (flat_old.get(k), flat_new.get(k)) for k in keys if flat_old.get(k) != flat_new.get(k)}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of a nested mapping by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        flat.update(flatten(value, f"{dotted}.") if isinstance(value, dict) and value else {dotted: value})
    return flat


def explain(config: Any, sources: dict[str, str], key: str | None = None) -> str:
    """A line for each value (or each under `key`): value, source, and the field's comment in the source code."""
    lines = []
    for dotted, value, comment in _leaves(config, ""):
        if key is None or dotted == key or dotted.startswith(f"{key}."):
            source = sources.get(dotted, "default")
            lines.append(f"{dotted} = {value!r}   [{source}]" + (f"\n    {comment}" if comment else ""))
    if not lines:
        known = [dotted for dotted, _, _ in _leaves(config, "")]
        raise ConfigError(f"there is no key {key!r}{_suggestion(str(key), known)}")
    return "\n".join(lines)


def unknown_key(key: str, known: Sequence[str], where: str) -> ConfigError:
    return ConfigError(f"{where}: unknown key {key!r}{_suggestion(key, known)}; known keys: {', '.join(known)}")


def _is_plain(text: str) -> bool:
    """Whether YAML reads `text` as itself."""
    try:
        return yaml.safe_load(text) == text
    except yaml.YAMLError:
        return False


# --- reading ---------------------------------------------------------------------------------------------------------


def _read_yaml(path: Path, sources: dict[str, str], chain: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve() if chain else path
    if path.resolve() in chain:
        raise ConfigError(f"{path}: `base:` forms a circle: {' -> '.join(str(p) for p in (*chain, path))}")
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        origin = f" (named in `base:` of {chain[-1]})" if chain else ""
        raise ConfigError(f"there is no configuration file {path}{origin}{hint}") from None
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError, PermissionError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {type(tree).__name__}, expected a mapping of sections (`train: ...`)")
    bases = tree.pop("base", None) or []
    merged: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        base_tree = _read_yaml(path.parent / base, sources, (*chain, path.resolve()))
        merge(merged, base_tree)
    sources.update({key: str(path) for key in flatten(tree)})
    return merge(merged, tree)


def _apply_override(tree: dict[str, Any], override: str, sources: dict[str, str]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", key):
        raise ConfigError(f"override {override!r} is not of the form section.key=value, for example train.steps=2000")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from None
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(
                f"override {override!r}: {section!r} holds the value {child!r}, it has no keys beneath it"
            )
        node = child
    node[leaf] = value
    sources.update({dotted: "override" for dotted in (flatten({key: value}) if isinstance(value, dict) else (key,))})


# --- building --------------------------------------------------------------------------------------------------------


def _checked(schema: type[T], tree: dict[str, Any], sources: dict[str, str]) -> T:
    config = _build(schema, tree, "", sources)
    check(config)
    return config


def _build(schema: type[T], tree: dict[str, Any], prefix: str, sources: dict[str, str]) -> T:
    hints = typing.get_type_hints(schema, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(schema) if f.init}  # type: ignore[arg-type]
    where = _where(prefix, sources)
    for key in tree:
        if key not in fields:
            raise unknown_key(
                f"{prefix}{key}", [f"{prefix}{name}" for name in fields], _where(f"{prefix}{key}", sources)
            )
    values = {}
    for name, field in fields.items():
        if name in tree:
            values[name] = _convert(hints[name], tree[name], f"{prefix}{name}", sources)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: the key {prefix}{name} is required ({_type_name(hints[name])}) and missing")
    return schema(**values)


def _convert(hint: Any, value: Any, dotted: str, sources: dict[str, str]) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        try:
            return _convert(arguments[0], _with_units(value, arguments[1]), dotted, sources)
        except ConfigError:
            raise _wrong(dotted, value, _type_name(hint), sources) from None
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, dotted, sources)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _build(typing.cast(type, hint), value, f"{dotted}.", sources)
    if origin is Literal:
        if value not in arguments:
            near = _suggestion(str(value), [str(a) for a in arguments])
            raise _wrong(dotted, value, f"one of {', '.join(repr(a) for a in arguments)}{near}", sources)
        return value
    if origin in (tuple, list) and isinstance(value, list | tuple):
        items = arguments[:1] * len(value) if origin is list or arguments[-1] is Ellipsis else arguments
        if len(items) != len(value):
            raise _wrong(dotted, value, f"{len(items)} values", sources)
        return origin(
            _convert(h, v, f"{dotted}[{i}]", sources) for i, (h, v) in enumerate(zip(items, value, strict=True))
        )
    if origin is dict and isinstance(value, dict):
        return {str(k): _convert(arguments[1], v, f"{dotted}.{k}", sources) for k, v in value.items()}
    if hint is float and isinstance(value, str):  # PyYAML reads 1e-3, which has no dot, as text
        value = _number(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if hint in (bool, int, str) and type(value) is hint:
        return value
    raise _wrong(dotted, value, _type_name(hint), sources)


def _with_units(value: Any, kind: str) -> Any:
    if not isinstance(value, str):
        return value
    units = _COUNT_UNITS if kind == "count" else _SECOND_UNITS
    match = re.fullmatch(r"\s*([\d_.]+(?:e[+-]?\d+)?)\s*([A-Za-z]+)\s*", value)
    if not match or match[2] not in units:
        return _number(value)
    number = float(match[1].replace("_", "")) * units[match[2]]
    return round(number) if kind == "count" else number


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _wrong(dotted: str, value: Any, expected: str, sources: dict[str, str]) -> ConfigError:
    return ConfigError(f"{_where(dotted, sources)}: {dotted} = {value!r} ({type(value).__name__}); expected {expected}")


def _where(dotted: str, sources: dict[str, str]) -> str:
    """The file (or "override") that set `dotted`, or the one that set its nearest neighbour."""
    dotted = dotted.rstrip(".")
    while dotted:
        found = [s for key, s in sources.items() if key == dotted or key.startswith(f"{dotted}.")]
        if found:
            return found[-1]
        dotted = dotted.rpartition(".")[0]
    return next(reversed(sources.values()), "configuration")


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        examples = {"count": "a whole number such as 2000, 10k or 1.5M", "duration": "seconds such as 90, 30min or 2h"}
        return examples[get_args(hint)[1]]
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _suggestion(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


# --- walking ---------------------------------------------------------------------------------------------------------


def _dataclasses_in(node: Any, dotted: str) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(node):
        for field in dataclasses.fields(node):
            yield from _dataclasses_in(getattr(node, field.name), f"{dotted}.{field.name}" if dotted else field.name)
        yield dotted, node
    elif isinstance(node, tuple | list):
        for i, item in enumerate(node):
            yield from _dataclasses_in(item, f"{dotted}[{i}]")


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any, str]]:
    comments = field_comments(type(node))
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value, comments.get(field.name, "")


def field_comments(schema: type) -> dict[str, str]:
    """The `# comment` behind each field of a dataclass, wrapped or not: the one place where a key is documented."""
    found: dict[str, str] = {}
    for owner in reversed([c for c in schema.__mro__ if dataclasses.is_dataclass(c)]):
        source = textwrap.dedent(inspect.getsource(owner))
        comments = {
            token.start[0]: token.string.removeprefix("#").strip()
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                found[node.target.id] = " ".join(comments[line] for line in lines if line in comments)
    return found
