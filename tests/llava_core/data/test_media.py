"""Fields and markers of other formats: found where they name a medium, not where a text speaks of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from instruct_records import record

from llava_core.data.instruct import FIELDS, load_instruct, record_problems
from llava_core.data.media import foreign_markers, unread_fields
from llava_core.runtime import DataError

MARKED = [
    "\\<image\\>\nWhat?",
    "<im\u200bage>\nWhat?",
    "<point_cloud>\nWhat?",
    "<depth>\nWhat?",
    "<|mm_pad|>",
    "<im_content>",
    "What? ![](a.jpg)",
    "<video>\nWhat?",
    "<image_1> and <image_2>",
    "<Img><ImageHere></Img> What",
    "<|vision_start|><|image_pad|><|vision_end|>Hi",
    "[IMG]What",
    "&lt;image&gt;\nhi",
    "&amp;lt;image&amp;gt; hi",
    "&#60;image&#62;",
    "Picture 1: <img>a.jpg</img>\nWhat?",
    "<Image>\nq",
    "< image >\nq",
    "<IMG_CONTEXT>",
    "<image/>\nwhat",
    "(<image>./</image>)\nq",
    "<image 1> what",
    "<start_of_image>",
    "<|image|>Hi",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<audio>\nTranscribe",
    "What happens? <video>",
    "Look at <video> and tell.",
    "<vila/image>",
    "<image_placeholder>x",
    "<fake_token_around_image><image><global-img>",
    "<im_start><im_patch><im_end>",
    "<img src='a.jpg'>\nWhat is it?",
    "![](a.jpg)\nWhat?",
    "{image}\nWhat?",
    "{{image}}\nq",
    "[image]\nq",
    "[Image 1]\nq",
    "<<image>>\nq",
    "<image here>\nq",
    "<Audio><AudioHere></Audio>",
    "<audio>a.wav</audio>hi",
    "data:image/png;base64,aaaa\nWhat?",
    "__IMAGE__\nq",
    '<video src="a.mp4"></video>\nwhat?',
    "＜image＞\nq",
    "<|media_begin|>",
    "<|begin_of_image|>",
    "<speech>\nq",
    "<sound>\nq",
    "<images>\nq",
    "<frame1>q",
    "<VideoHere>",
    "Describe <video>.",
    "<|img|>x",
]
SPOKEN_OF = [
    ("![build](https://example.org/badge.svg)\nImprove this page.", "It has a badge."),
    ("What does `<|image_pad|>` stand for?", "It is a token of Qwen2-VL."),
    ("How deep is it?", "The depth is 3 m. [1]"),
    ("How do I use the <video> tag in HTML?", "Use <video controls> with <source>. Then </video>."),
    ("I have <video src='a.mp4'></video> in my page, how do I center it with CSS?", "Use flex."),
    ("<image>\nWhat?", "It."),
    ("Is it from a video? [1] says so", "The video <b>shows</b> it."),
    ("Fix `<video>` here", "ok"),
    ("<video> tag: what is it?", "An element"),
    ("write java List<Image> x = new ArrayList<Image>();", "ok"),
    ("Make a page", "```html\n<video>\n<source src='a'>\n</video>\n```"),
    ("Make a page", "Sure:\n<video width=3 controls>\n</video>"),
    ("What does <audio> do?", "The HTML <audio> element plays."),
    ("Use [brackets] and {x}", "f"),
    ("Dear [Name], [Video]", "x"),
    ("x", "10 best cats [VIDEO]"),
    ("<|im_start|>user", "x"),
    ("Is 3 < 4 & 5 > 2?", "yes"),
    ("React: <ImageView/> or <Image source={x} />?", "ok"),
    ("Give AT&T &lt;b&gt;", "ok"),
    ("<img src='a'> <div>b</div> fix this html", "ok"),
    ("In XML <image_content>a</image_content>", "ok"),
    ("How do I embed <video>", "In HTML you do"),
    ("x", "<video>: a tag"),
    ("#include <SDL_image.h>\n#include <vector>", "x"),
    ("The Picture of Dorian Gray <3", "x"),
]
UNREAD: list[tuple[dict[str, Any], str | None]] = [
    ({"image_path": "11.jpg"}, "1.jpg"),
    ({"speech_path": "a"}, None),
    ({"mp3": "a"}, None),
    ({"point_cloud_file": "a"}, None),
    ({"points": "scene.ply"}, None),
    ({"video": "clip.mp4"}, None),
    ({"images": ["a.jpg"]}, None),
    ({"image_path": "a.jpg"}, None),
    ({"audio": "a.wav"}, None),
    ({"img": "a.jpg"}, None),
    ({"image_id": 458752}, None),
    ({"imageId": "n1"}, None),
    ({"image_url": "http://x/a"}, None),
    ({"videos": ["a.mp4"]}, "a.jpg"),
    ({"images": ["a.jpg", "b.jpg"]}, "a.jpg"),
    ({"image2": "b.jpg"}, "a.jpg"),
    ({"file": "x/a.JPG"}, None),
    ({"meta": {"image_path": "q"}}, None),
    ({"meta": {"video": "q"}}, "a.jpg"),
    ({"frames": ["f1.jpg", "f2.jpg"]}, "a.jpg"),
    ({"image_base64": "/9j/4AAQSk"}, None),
    ({"media": [{"type": "image", "url": "http://x"}]}, None),
    ({"images": [{"bytes": b"123", "path": None}]}, None),
    ({"videoPath": "v"}, None),
    ({"url": "http://x/a.jpg"}, None),
    ({"pixel_values": [[0.1, 0.2]]}, None),
    ({"data": "data:image/png;base64,xx"}, None),
    ({"has_image": True}, None),
    ({"speech": "a.wav"}, "a.jpg"),
    ({"audios": ["a.wav"]}, None),
    ({"video_path": "v.mp4"}, "f.jpg"),
    ({"picture": "x.png"}, None),
    ({"attachments": [{"name": "a.jpg"}]}, None),
    ({"image_list": ["a", "b"]}, None),
    ({"mask_image": "m.png"}, "a.jpg"),
    ({"images": [["a.jpg"]]}, None),
    ({"sound": {"path": "a.wav"}}, None),
    ({"video": {"path": "a"}}, None),
    ({"filename": "a.jpeg"}, None),
    ({"depth": "d.png"}, None),
    ({"img_b64": "iVBOR"}, None),
    ({"imgs": ["a"]}, None),
]
HARMLESS: list[tuple[dict[str, Any], str | None]] = [
    ({"image_file": "COCO_train2014_000000033471.jpg"}, "coco/000000033471.png"),
    ({"model": "gpt4", "source": "coco", "width": 640, "height": 480}, "a.jpg"),
    ({"model": "", "source": "sharegpt"}, None),
    ({"images": []}, None),
    ({"video": None, "videos": [], "audio": "", "has_image": False}, None),
    ({"image_id": 5, "image_width": 3, "image_url": "http://x/y.jpg", "image_size": [3, 4]}, "a.jpg"),
    ({"images": ["a.jpg"]}, "coco/a.jpg"),
    ({"image_path": "/data/coco/a.jpg"}, "a.jpg"),
    ({"width_list": [1], "height_list": [2]}, "a.jpg"),
    ({"video_id": "v1", "timestamp": 3.2, "video_fps": 2}, "f.jpg"),
    ({"image_type": "photo", "image_caption": "A dog"}, None),
    ({"url": "http://x/a.jpg"}, "b.jpg"),
    ({"sound": "a dog barks"}, "a.jpg"),
    ({"part_of_speech": "noun", "social_media": "x", "media_type": "text", "modality": "text"}, None),
    ({"image_url": float("nan")}, None),
    ({"images": [None]}, None),
    ({"image": None, "video": {"path": None, "bytes": None}}, None),
    ({"question": "what video?", "meta": {"a": 1}}, None),
    ({"pretrain": 1, "tags": ["photo.", "b"]}, None),
    ({"original_image": "raw_a.jpg"}, "a.jpg"),
    ({"image_b64": "xx"}, "a.jpg"),
    ({"image_1": "a.jpg"}, "a.jpg"),
    ({"bbox": [1, 2], "clip_score": 0.3}, "a.jpg"),
    ({"num_images": 1}, "a.jpg"),
    ({"soundness": 1, "imagery": "x", "imagination": 1}, None),
]


@pytest.mark.parametrize("text", MARKED)
def test_markers_of_other_formats_are_found(text: str) -> None:
    assert [k for k, _ in foreign_markers([("human", text), ("gpt", "A street.")])]
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "A street."}]
    assert "unread_medium" in [kind for kind, _ in record_problems({"id": "1", "conversations": turns})]


@pytest.mark.parametrize(("question", "answer"), SPOKEN_OF)
def test_texts_about_media_and_markup_have_no_marker(question: str, answer: str) -> None:
    assert list(foreign_markers([("human", question), ("gpt", answer)])) == []


@pytest.mark.parametrize(("fields", "image"), UNREAD)
def test_fields_that_name_another_medium_are_found(fields: dict[str, Any], image: str | None) -> None:
    assert list(unread_fields(fields, FIELDS, image))
    assert "unread_medium" in [kind for kind, _ in record_problems(record(image=image, **fields))]


@pytest.mark.parametrize(("fields", "image"), HARMLESS)
def test_fields_that_name_no_other_medium_are_left(fields: dict[str, Any], image: str | None) -> None:
    assert list(unread_fields(fields, FIELDS, image)) == []
    assert list(record_problems(record(image=image) | fields | {"image": image})) == []


def test_media_of_turns_and_videos_as_image_are_found(tmp_path: Path) -> None:
    turned = record(image=None)
    turned["conversations"][0]["image"] = "a.jpg"
    assert [kind for kind, _ in record_problems(turned)] == ["unread_medium"]
    assert [kind for kind, _ in record_problems(record(image="clip.MP4"))] == ["unread_medium"]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([record(image=None, video="clip.mp4")]))
    with pytest.raises(DataError, match=r"record a: .* not video"):
        load_instruct(path)


def test_a_null_image_is_a_text_only_record(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([record(image=None) | {"image": None}]))
    assert load_instruct(path, tmp_path)[0].image is None
