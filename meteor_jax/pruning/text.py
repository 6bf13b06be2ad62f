"""The text form of a plan, for command lines and config files.

    full    fastv(layer=2, keep=256)    meteor(decode.heads=0, fuse.similarity=cosine)    plan.json

A call of a preset, with its arguments; or of a plan in the config, whose fields the arguments
replace. A dotted argument sets a field of all steps of a stage (`encode.`, `fuse.`, `decode.`) that
have it: of the method, the budget or the step itself. A tuple with one value a step is spread over
them; `decode.layers` sets where the decoder's steps are, `encode.method=random` another method,
`decode.budget=fixed` another budget, `decode=None` drops the stage.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meteor_jax.config import ConfigError, build, convert, suggest
from meteor_jax.pruning.budgets import Budget
from meteor_jax.pruning.method import Method
from meteor_jax.pruning.plan import PrunePlan, Step, budget_class
from meteor_jax.pruning.points import STAGES, before_layer
from meteor_jax.pruning.registry import method_class, presets

FIELDS = (*STAGES, "name", "positions", "enter_at")  # of a plan, that arguments may set
_DOT = "__dot__"  # stands for the dot of a dotted argument, which Python's grammar has not
_CALL = r"([A-Za-z_]\w*)\s*(\(.*\))?"


def parse_plan(text: str, *, library: Mapping[str, str | PrunePlan] | None = None) -> PrunePlan:
    """The plan that `text` names: a call, a JSON file's path, or JSON itself.

    A name is looked up in `library` (a config's `plans`: name → text or plan) first and then among
    the presets.

    Raises:
        ConfigError: one line that says what is wrong and what would be right.
    """
    library = dict(library or {})
    text = text.strip()
    if text.startswith("{"):
        return PrunePlan.from_json(text)
    if text.endswith(".json"):
        path = Path(text)
        if not path.is_file():
            raise ConfigError(f"plan file {text} does not exist.")
        return PrunePlan.from_json(path.read_text(), where=text)
    name, arguments = _read_call(text)
    known = presets()
    if name in library:
        _refuse_hidden_arguments(name, arguments, known)
        plan = library[name]
        if isinstance(plan, str):
            rest = {key: value for key, value in library.items() if key != name}
            plan = parse_plan(plan, library=rest)
        plan = dataclasses.replace(plan, name=name)
        return override(plan, **{"name": text.replace(" ", "")} | arguments) if arguments else plan
    if name not in known:
        raise ConfigError(f"no plan '{name}'.{suggest(name, [*library, *known])}")
    parameters = inspect.signature(known[name]).parameters
    direct = {key: value for key, value in arguments.items() if key in parameters}
    fields = {key: value for key, value in arguments.items() if key not in parameters}
    for key in fields:
        if key.split(".")[0] not in FIELDS:
            raise ConfigError(f"plan '{text}': no argument '{key}'.{suggest(key, parameters)}")
    required = [key for key, value in parameters.items() if value.default is value.empty]
    missing = [key for key in required if key not in direct]
    if missing:
        raise ConfigError(
            f"plan '{text}': missing {', '.join(missing)}; write {name}"
            f"({', '.join(f'{key}=…' for key in required)})."
        )
    try:
        plan = _call(known[name], direct)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"plan '{text}': {error}") from error
    return override(plan, **fields)


def _refuse_hidden_arguments(
    name: str, arguments: Mapping[str, Any], known: Mapping[str, Any]
) -> None:
    """A config's plan has fields, no parameters; those of a preset of its name cannot be reached.

    Raises:
        ConfigError: if one of `arguments` is such a parameter.
    """
    parameters = inspect.signature(known[name]).parameters if name in known else {}
    hidden = [key for key in arguments if key in parameters and key not in FIELDS]
    if hidden:
        raise ConfigError(
            f"plan '{name}' of the config takes fields, such as fuse.keep=8, and no {hidden[0]}=…; "
            f"the preset {name}({', '.join(f'{key}=…' for key in parameters)}) is hidden by it: "
            "rename the config's plan."
        )


def parse_method(text: str) -> Method:
    """The method that `text` names, `name` or `name(field=value)`.

    Raises:
        ConfigError: for an unknown method or field.
    """
    name, arguments = _read_call(text.strip())
    return build(method_class(name), arguments, where=f"method '{name}'")


def _call(function: Any, arguments: Mapping[str, Any]) -> PrunePlan:
    hints = typing.get_type_hints(function)
    return function(**{key: convert(hints[key], v, key) for key, v in arguments.items()})


def split_plans(text: str) -> list[str]:
    """Plans separated by commas; commas within parentheses belong to a plan."""
    parts, depth = [""], 0
    for character in text:
        depth += {"(": 1, ")": -1, "{": 1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def override(plan: PrunePlan, **fields: Any) -> PrunePlan:
    """`plan` with fields replaced, those of a stage's steps by names such as `decode.heads`.

    Raises:
        ConfigError: for an unknown field, a wrong type, or a stage that the plan lacks.
    """

    def order(path: str) -> tuple[int, int]:
        """Stages first, then which steps they have, then methods and budgets, then their fields."""
        early = ("layers", "method", "budget")
        leaf = path.split(".")[-1]
        return path.count("."), early.index(leaf) if leaf in early else len(early)

    for path in sorted(fields, key=order):
        stage, _, field = path.partition(".")
        if field:
            plan = _set_in_stage(plan, stage, field, fields[path])
        elif stage in STAGES and fields[path] is None:
            plan = plan.without(stage)
        else:
            values = {**plan.__dict__, path: fields[path]}
            plan = build(PrunePlan, values, where=f"plan '{plan.name}'")
    return plan


def _set_in_stage(plan: PrunePlan, stage: Any, field: str, value: Any) -> PrunePlan:
    """`value` in every step of a stage that has the field, or its items, one a step."""
    steps, where = plan.stage(stage), f"plan '{plan.name}': {stage}"
    if not steps:
        raise ConfigError(f"plan '{plan.name}' has no stage '{stage}' to set {stage}.{field} in.")
    if field == "layers" and stage == "decode":
        layers = convert(tuple[int, ...], value, f"{where}.layers")
        repeated = (*steps, *steps[-1:] * len(layers))  # more of them repeat the last
        moved = (
            dataclasses.replace(step, at=before_layer(layer))
            for step, layer in zip(repeated, layers, strict=False)
        )
        return dataclasses.replace(plan, steps=(*plan.without(stage).steps, *moved))
    having = [step for step in steps if field in _fields_of(step)]
    if not having:
        names = {name for step in steps for name in _fields_of(step)}
        raise ConfigError(f"{where}.{field}: no such field.{suggest(field, names)}")
    try:
        changed = [_set(step, field, value, where) for step in having]
    except ConfigError:
        if not isinstance(value, (list, tuple)) or len(value) != len(having):
            raise
        changed = [_set(s, field, item, where) for s, item in zip(having, value, strict=True)]
    new = iter(changed)
    return plan.map_steps(lambda step: next(new) if step in having else step, stage=stage)


def _fields_of(step: Step) -> set[str]:
    """The fields of a step, its method and its budget."""
    return {*step.__dict__, *step.method.__dict__, *step.budget.__dict__} - {"at"}


def _set(step: Step, field: str, value: Any, where: str) -> Step:
    owners = [name for name in ("budget", "method") if field in getattr(step, name).__dict__]
    if owners:
        part = getattr(step, owners[0])
        value = build(type(part), {**part.__dict__, field: value}, where=where)
        field = owners[0]
    elif field in ("method", "budget"):
        class_of = method_class if field == "method" else budget_class
        value = _other(getattr(step, field), value, class_of, where)
    return build(Step, {**step.__dict__, field: value}, where=where)


def _other(old: Method | Budget, value: Any, class_of: Any, where: str) -> Any:
    """An object of the class that `value` names, with the fields that both have."""
    if isinstance(value, (Method, Budget)):
        return value
    name, arguments = value if isinstance(value, tuple) and len(value) == 2 else (value, {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ConfigError(f"{where}: expected a name, got {value!r:.60}.")
    cls = class_of(name)
    theirs = {field.name for field in dataclasses.fields(cls)}
    same = {key: item for key, item in old.__dict__.items() if key in theirs}
    return build(cls, same | arguments, where=where)


def _read_call(text: str) -> tuple[str, dict[str, Any]]:
    """The name that is called, and its keyword arguments: Python literals or words."""
    match = re.fullmatch(_CALL, text, flags=re.DOTALL)
    try:
        source = re.sub(r"\.(?=\w+\s*=(?!=))", _DOT, text)
        tree = ast.parse(source, mode="eval").body if match else None
    except SyntaxError:
        tree = None
    if isinstance(tree, ast.Name):
        return tree.id, {}
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
        raise ConfigError(f"plan '{text}': expected a name, name(field=value, …) or a .json file.")
    if tree.args or any(keyword.arg is None for keyword in tree.keywords):
        got = ", ".join(map(ast.unparse, tree.args))
        raise ConfigError(f"plan '{text}': expected field=value, got '{got}'.")
    return tree.func.id, _keywords(tree, text)


def _keywords(call: ast.Call, text: str) -> dict[str, Any]:
    """The keyword arguments of a call, each given once."""
    arguments: dict[str, Any] = {}
    for keyword in call.keywords:
        name = (keyword.arg or "").replace(_DOT, ".")
        if name in arguments:
            raise ConfigError(f"plan '{text}': '{name}' is given twice.")
        arguments[name] = _value(keyword.value, text)
    return arguments


def _value(node: ast.expr, text: str) -> Any:
    """A literal; a bare word is a string; a call is (its name, its arguments)."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(_value(item, text) for item in node.elts)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        return node.func.id, _keywords(node, text)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ConfigError(f"plan '{text}': cannot read '{ast.unparse(node)}'.") from None
