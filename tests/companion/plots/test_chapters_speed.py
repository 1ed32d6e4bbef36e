from __future__ import annotations

from companion.plots import chapters_speed as speed


def test_functions_are_timed_in_turns() -> None:
    calls: list[str] = []
    times = speed.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert all(t["low"] <= t["median"] <= t["high"] for t in times.values())
