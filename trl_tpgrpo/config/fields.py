"""Fields of a settings dataclass: help texts, limits, and values that are not the defaults."""

import inspect
import operator
import re
from dataclasses import MISSING, fields
from types import MappingProxyType
from typing import Annotated, Any, TypeVar, get_origin


COMPARISONS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}

# A parameter in a docstring: its name, type and default, and its description
PARAMETER = re.compile(r"^ {4}(\w+) \(.+?\): (.+(?:\n {8}.+)*)", re.MULTILINE)
SECRET = re.compile(r"(?:^|_)(?:token|key|secret|password|auth|authorization|credentials?)$", re.IGNORECASE)
LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")  # user and password in an URL
Config = TypeVar("Config", bound=type)


def described(config: Config) -> Config:
    """Set the help text of each field from the docstring of the dataclass, and its choices."""
    items, limits = {item.name: item for item in fields(config)}, field_limits(config)
    for name, text in PARAMETER.findall(inspect.cleandoc(config.__doc__ or "")):
        plain = re.sub(r"\[`~?(.+?)`\]", r"\1", " ".join(text.split())).replace("%", "%%")
        choices = {"choices": tuple(filter(None, limits[name]))} if isinstance(limits.get(name), tuple) else {}
        items[name].metadata = MappingProxyType({**items[name].metadata, **choices, "help": plain})
    return config


def field_limits(config: type) -> dict[str, Any]:
    """Return the limits of fields from their `Annotated` types: a tuple of choices, or bounds."""
    kinds = inspect.get_annotations(config)  # not the fields' types, because transformers' parser replaces them
    return {name: kind.__metadata__[0] for name, kind in kinds.items() if get_origin(kind) is Annotated}


def is_within(value: Any, limit: Any) -> bool:
    """Check that a value, or each of a list, is in a tuple or in bounds such as "above 0 and at most 1, or None"."""
    if isinstance(value, list):
        return all(is_within(item, limit) for item in value)
    if isinstance(limit, tuple):
        return value in limit
    bounds, _, exception = limit.partition(", or ")
    if value is None or isinstance(value, str):
        return bool(exception) and str(value) == exception.strip("'")
    limits = (bound.rsplit(" ", 1) for bound in bounds.split(" and "))
    return all(COMPARISONS[comparison](value, float(number)) for comparison, number in limits)


def without_secrets(value: Any, name: str = "") -> Any:
    """Return a value with tokens, keys and passwords replaced by `<NAME>`, and logins in URLs by `<LOGIN>`."""
    if isinstance(value, dict):
        return {key: without_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(without_secrets(item, name) for item in value)
    if not isinstance(value, str):
        return value
    return f"<{name.upper()}>" if value and SECRET.search(name) else LOGIN.sub("<LOGIN>", value)


def field_defaults(config: Any) -> dict[str, Any]:
    """Return the defaults of all fields except tokens."""
    public = [item for item in fields(config) if not item.name.endswith("_token")]
    return {item.name: item.default if item.default_factory is MISSING else item.default_factory() for item in public}


def non_defaults(config: Any) -> dict[str, Any]:
    """Return the fields of a dataclass, except tokens, whose values are not the defaults."""
    initial = field_defaults(config)
    return {name: value for name, value in vars(config).items() if name in initial and value != initial[name]}
