from __future__ import annotations

from typing import Any

import pytest

from llava_core.registry import Registry
from llava_core.runtime import ConfigError


def test_registered_part_is_looked_up_by_exact_name() -> None:
    parts: Registry[type] = Registry("shape")
    circle = parts.register("circle")(type("Circle", (), {}))
    assert parts.get("circle") is circle
    assert parts.names() == ["circle"]


def test_unknown_name_lists_known_and_nearest_names() -> None:
    parts: Registry[int] = Registry("shape")
    parts.register("circle")(1)
    parts.register("square")(2)
    with pytest.raises(ConfigError, match=r"unknown shape 'cirle'; did you mean 'circle'\? \(known: circle, square\)"):
        parts.get("cirle")
    with pytest.raises(ConfigError, match=r"unknown shape 'zzz' \(known"):
        parts.get("zzz")


def test_duplicate_name_is_refused() -> None:
    parts: Registry[int] = Registry("shape")
    parts.register("circle")(1)
    with pytest.raises(ConfigError, match="twice"):
        parts.register("circle")(2)
    assert parts.get("circle") == 1


@pytest.mark.parametrize("name", [{"a": 1}, [1]])
def test_a_name_of_another_type_is_unknown(name: Any) -> None:
    with pytest.raises(ConfigError, match="unknown template"):
        Registry[int]("template").get(name)
