"""Settings of the CC3M filter: types and values are checked."""

from __future__ import annotations

import pytest

from companion.data_tools.filter_settings import FilterSettings, settings_from
from llava_core.runtime import ConfigError


def test_command_line_settings_are_checked() -> None:
    settings = settings_from({"draw": "top_up", "cap": 50, "max_words": 3, "lowercase": False})
    assert settings == FilterSettings(draw="top_up", cap=50, max_words=3, lowercase=False)
    assert settings_from({"max_words": None}) == FilterSettings()
    with pytest.raises(ConfigError, match="no filter setting 'caps'; choose one of phrases, lowercase"):
        settings_from({"caps": 3})
    with pytest.raises(ConfigError, match=r"cap = '3': write int, e\.g\. 100"):
        settings_from({"cap": "3"})


def test_unknown_setting_is_an_error() -> None:
    with pytest.raises(ConfigError, match="order = 'rarest'; choose one of static, remaining"):
        FilterSettings(order="rarest")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cap = 0; write 1 or more"):
        FilterSettings(cap=0)
