"""Charts of root verbs and the browsers that work without a kernel."""

from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from PIL import Image

from companion.data_tools.verbs import BARE, NONE, PAIR, Verbs
from companion.plots import figures
from companion.plots.looking import drawn_pairs, sample_browser, sample_html, thresholds, verb_browser, verb_chart

FEW = Verbs(
    {("describe", "image"): 90, ("describe", "scene"): 20, ("hold", "<thing>"): 29, ("hold", "cup"): 1},
    {PAIR: 140, BARE: 40, NONE: 10},
)
NONE_AT_ALL = Verbs({}, {PAIR: 0, BARE: 5, NONE: 5})


def words(svg: str) -> list[str]:
    root = ElementTree.fromstring(svg)  # well-formed, or this raises
    return [text.text or "" for text in root.iter("{http://www.w3.org/2000/svg}text")]


def test_verb_chart_follows_threshold_and_limits() -> None:
    assert drawn_pairs(FEW) == {"describe": {"image": 90, "scene": 20}, "hold": {"<thing>": 29, "cup": 1}}
    assert drawn_pairs(FEW, least=30) == {"describe": {"image": 90}}
    assert drawn_pairs(FEW, most=(1, 1)) == {"describe": {"image": 90}}


def test_verb_chart_names_words_and_question_count() -> None:
    said = words(verb_chart(FEW, "detail", 2).data)
    assert said[:2] == ["detail", "139 of 190 questions; pairs that occur 2 times or more"]
    assert said[2:] == ["describe", "image", "scene", "hold", "<thing>"]
    assert words(verb_chart(FEW, "detail").data)[2:] == said[2:]  # for the cup there is no room, but a tooltip
    assert "hold cup: 1<" in verb_chart(FEW, "detail").data
    assert words(verb_chart(NONE_AT_ALL, "x").data)[-1] == "no question has a verb with an object noun"
    assert words(verb_chart(FEW, "x", 91).data)[-1] == "no pair occurs that often"


def test_verb_chart_of_one_pair_is_a_full_ring() -> None:
    svg = verb_chart(Verbs({("show", "place"): 7}, {PAIR: 7}), "x").data
    paths = re.findall(r'<path d="([^"]+)"', svg)
    assert len(paths) == 2
    for path in paths:  # an arc whose ends are one point is not drawn at all
        points = re.findall(r"(?:M|L|0 [01] )([\d.]+ [\d.]+)(?=[ALZ])", path)
        assert all(a != b for a, b in pairwise(points))


def test_thresholds_end_at_the_most_frequent_pair() -> None:
    assert thresholds({"a": FEW, "b": NONE_AT_ALL}) == [1, 2, 5, 10, 20, 50]
    assert thresholds({"b": NONE_AT_ALL}) == [1]


@pytest.mark.parametrize("kinds", [{"a": FEW}, {"a": FEW, "b": NONE_AT_ALL}])
def test_slider_selects_a_page_in_the_browser(kinds: dict[str, Verbs]) -> None:
    from ipywidgets.widgets import widget, widget_link

    box = verb_browser(kinds)
    slider, stack = box.children
    assert len(slider.options) == len(stack.children) == 6
    assert "hold cup" in stack.children[0].value
    assert "hold cup" not in stack.children[1].value
    links = [w for w in widget._instances.values() if isinstance(w, widget_link.Link)]
    assert any((w.source, w.target) == ((slider, "index"), (stack, "selected_index")) for w in links)


def test_sample_page_shows_prompt_answer_and_supervision() -> None:
    tokens = figures.supervised_text_html(["<image>", "Why", "Because"], [-100, -100, 7])
    turns = [("<image>\nWhy?", "Because <it> is.")]
    page = sample_html(Image.new("RGB", (8, 8)), turns, "A caption.\ncar: [0, 0, 1, 1]", tokens)
    for part in (
        "data:image/png;base64,",
        "⟨image⟩ ",
        "Because &lt;it&gt; is.",
        "car: [0, 0, 1, 1]",
        "1 of 3 positions",
    ):
        assert part in page, part
    assert "(not recorded)" in sample_html(None, turns, None, tokens)
    tabs = sample_browser({"detail": [page], "complex": [page, page]})
    assert tabs.titles == ("detail", "complex")
    assert [len(leaf.children[1].children) for leaf in tabs.children] == [1, 2]
