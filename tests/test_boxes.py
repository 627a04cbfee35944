"""Box syntax of the families: format -> parse round trips, and answers broken in every way a model breaks them."""

from __future__ import annotations

import json
import math
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pr1.families import FAMILIES
from pr1.records import Item

JSON, NATIVE = FAMILIES["qwen2_5_vl"], FAMILIES["qwen2_vl"]
CAT = '{"bbox_2d": [1, 2, 30, 40], "label": "cat"}'
DOG = '{"bbox_2d": [5.5, 6, 7, 8.25], "label": "dog"}'
CAT_BOX, DOG_BOX = (1.0, 2.0, 30.0, 40.0), (5.5, 6.0, 7.0, 8.25)


def native(label: str, *boxes: str) -> str:
    phrase = f"<|object_ref_start|>{label}<|object_ref_end|>" if label else ""
    return phrase + "".join(f"<|box_start|>{box}<|box_end|>" for box in boxes)


def found(answer) -> list[tuple]:
    return [(item.label, item.box, item.valid) for item in answer.items]


def flags(answer) -> tuple[bool, bool]:
    return answer.format_ok, answer.truncated


# ---- formatting ------------------------------------------------------------------------------------------------------


def test_formats_are_the_models_own():
    items = [("cat", [1, 2, 30, 40]), ("hot dog", (0, 0, 5, 6))]
    expected = '[{"bbox_2d": [1, 2, 30, 40], "label": "cat"}, {"bbox_2d": [0, 0, 5, 6], "label": "hot dog"}]'
    assert JSON.format_boxes(items) == expected == json.dumps(json.loads(expected))
    assert JSON.format_boxes([]) == JSON.format_boxes([("cat", None)]) == "[]"
    assert NATIVE.format_boxes(items) == native("cat", "(1,2),(30,40)") + native("hot dog", "(0,0),(5,6)")
    assert NATIVE.format_boxes([("cat", None)]) == "<|object_ref_start|>cat<|object_ref_end|>"
    assert NATIVE.format_boxes([]) == "none"


LABELS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
COORDINATES = st.tuples(*[st.integers(0, 4000)] * 4).map(
    lambda v: (min(v[0], v[2]), min(v[1], v[3]), max(v[0], v[2]), max(v[1], v[3]))
)
BOXES = st.lists(st.tuples(LABELS, COORDINATES), max_size=6)


@given(BOXES, st.sampled_from(["{}", "```json\n{}\n```", "  {}\n", "```\n{}```"]))
@settings(max_examples=150, deadline=None)
def test_json_round_trip_with_any_label(items, around):
    text = around.replace("{}", JSON.format_boxes(items))
    answer = JSON.parse_boxes(text)
    assert found(answer) == [(label, tuple(map(float, box)), True) for label, box in items]
    assert flags(answer) == (True, False)
    for item, (label, box) in zip(answer.items, items, strict=True):
        assert json.loads(text[item.start : item.end]) == {"bbox_2d": list(box), "label": label}


@given(BOXES)
@settings(max_examples=150, deadline=None)
def test_native_round_trip(items):
    items = [(label.replace("<", "").strip() or "x", box) for label, box in items]
    text = NATIVE.format_boxes(items)
    answer = NATIVE.parse_boxes(text)
    assert found(answer) == [(label, tuple(map(float, box)), True) for label, box in items]
    assert flags(answer) == (True, False)
    assert "".join(text[item.start : item.end] for item in answer.items) == (text if items else "")


# ---- JSON answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, items, format_ok, truncated",
    [
        (f"[{CAT}, {DOG}]", [("cat", CAT_BOX, True), ("dog", DOG_BOX, True)], True, False),
        (f"```json\n[\n\t{CAT},\n\t{DOG}\n]\n```", [("cat", CAT_BOX, True), ("dog", DOG_BOX, True)], True, False),
        ("[]", [], True, False),
        ("```json\n[]\n```", [], True, False),
        ("", [], False, False),
        ("There are none.", [], False, False),
        (CAT, [("cat", CAT_BOX, True)], False, False),
        (f"Here you are: [{CAT}]. Done.", [("cat", CAT_BOX, True)], False, False),
        (f"[{CAT}][{DOG}]", [("cat", CAT_BOX, True), ("dog", DOG_BOX, True)], False, False),
        (f"```json\n[{CAT}]", [("cat", CAT_BOX, True)], False, False),
        (f"[{CAT},]", [("cat", CAT_BOX, True)], False, False),
        ('[{"bbox_2d": [1, 2, 30, 40,], "label": "cat",}]', [("cat", CAT_BOX, True)], False, False),
        (f"[{CAT}, ", [("cat", CAT_BOX, True)], False, True),
        (f"[{CAT}", [("cat", CAT_BOX, True)], False, True),
        (f"[{CAT}, {DOG[:-1]}", [("cat", CAT_BOX, True)], False, True),
        (f"```json\n[{CAT}, {DOG[:9]}", [("cat", CAT_BOX, True)], False, True),
        ("[", [], False, True),
        ("```json\n[", [], False, True),
        # broken items count, as wrong ones
        ('[{"bbox_2d": [1, 2, 30, 40]}]', [("", CAT_BOX, False)], False, False),
        ('[{"label": "cat"}]', [("cat", None, False)], False, False),
        ('[{"bbox_2d": [1, 2, 30, 40], "label": 3}]', [("", CAT_BOX, False)], False, False),
        ('[{"bbox_2d": [1, 2, 30, 40], "label": ""}]', [("", CAT_BOX, False)], False, False),
        ('see {"point_2d": [1, 2], "label": "cat"}', [("cat", None, False)], False, False),
        (f'[{{"bbox_2d": [1, 2, "label": "cat"}}, {DOG}]',
         [("cat", None, False), ("dog", DOG_BOX, True)], False, False),
        (f'[{{"bbox_2d": [1, 2, 3, 4], "label": "cat}}, {DOG}]',
         [("", None, False), ("dog", DOG_BOX, True)], False, False),
        (f'[{{"bbox_2d": [1, 2, 30, 40], {DOG}]', [("", None, False), ("dog", DOG_BOX, True)], False, False),
        (f'{{"objects": [{CAT}, {DOG}]}}', [("cat", CAT_BOX, True), ("dog", DOG_BOX, True)], False, False),
        ("{'bbox_2d': [1, 2, 3, 4], 'label': 'cat'}", [("", None, False)], False, False),
        ("__import__('os').system('true') {}", [("", None, False)], False, False),
        ("[[1, 2, 30, 40]]", [], False, False),
        ("[1, 2]", [], False, False),
    ],
)  # fmt: skip
def test_json_answers(text, items, format_ok, truncated):
    answer = JSON.parse_boxes(text)
    assert found(answer) == items
    assert flags(answer) == (format_ok, truncated)
    for item in answer.items:
        assert text[item.start] == "{"
        if item.valid:
            assert text[item.start : item.end] in (CAT, DOG) or text[item.end - 2 : item.end] == ",}"


@pytest.mark.parametrize(
    "box",
    "[] [1,2,3] [1,2,3,4,5] [3,0,1,9] [0,3,9,1] [NaN,0,1,1] [0,0,Infinity,1] [-Infinity,0,1,1] [0,0,1e400,1] "
    f'[0,0,1e12,1] ["1",2,3,4] [true,0,1,1] [null,0,1,1] [[1,2],[3,4]] 7 "1,2,3,4" null {{"x":1}} '
    f"[0,0,{'9' * 5000},1] [0,0,{'9' * 400},1]".split(),
)
def test_boxes_that_are_none(box):
    answer = JSON.parse_boxes(f'[{{"bbox_2d": {box}, "label": "cat"}}]')
    assert [item.valid for item in answer.items] in ([False], [False, False]) and not answer.format_ok
    assert all(item.box is None for item in answer.items)


def test_degenerate_and_negative_boxes_are_numbers_like_others():
    answer = JSON.parse_boxes('[{"bbox_2d": [-3, 2, -3, 2.5e1], "label": "a"}]')
    assert found(answer) == [("a", (-3.0, 2.0, -3.0, 25.0), True)] and answer.format_ok


def test_labels_can_always_be_written_to_a_file():
    answer = JSON.parse_boxes('[{"bbox_2d": [1, 2, 3, 4], "label": "\\ud83d x \\u00e9"}]')
    assert answer.items[0].label.encode("utf-8") == "? x é".encode()


# ---- native answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, items, format_ok, truncated",
    [
        (native("cat", "(1,2),(30,40)"), [("cat", CAT_BOX, True)], True, False),
        (native("cat", "(1,2),(30,40)", "( 5.5, 6 ) , (7,8.25)"),
         [("cat", CAT_BOX, True), ("cat", DOG_BOX, True)], True, False),
        (native("cat", "(1,2),(30,40)") + "\n" + native("dog", "(5.5,6),(7,8.25)") + "\n",
         [("cat", CAT_BOX, True), ("dog", DOG_BOX, True)], True, False),
        (native("the cat"), [], True, False),
        ("none", [], True, False),
        (" None.\n", [], True, False),
        ("", [], False, False),
        ("There is nonesuch", [], False, False),
        ("A cat: " + native("cat", "(1,2),(30,40)"), [("cat", CAT_BOX, True)], False, False),
        (native("cat", "(1,2),(30,40)") + " and", [("cat", CAT_BOX, True)], False, False),
        (native("", "(1,2),(30,40)"), [("", CAT_BOX, False)], False, False),
        (native(" ", "(1,2),(30,40)"), [("", CAT_BOX, False)], False, False),
        (native("cat", "(30,2),(1,40)"), [("cat", None, False)], False, False),
        (native("cat", "(1,2),(30)"), [("cat", None, False)], False, False),
        (native("cat", "(1,2),(30,nan)"), [("cat", None, False)], False, False),
        (native("cat", f"(1,2),(30,{'9' * 400})"), [("cat", None, False)], False, False),
        (native("cat", ""), [("cat", None, False)], False, False),
        (native("cat", "(1,2),(30,40)") + "<|object_ref_start|>do", [("cat", CAT_BOX, True)], False, True),
        (native("cat") + "<|box_start|>(1,2),(3", [], False, True),
        ("<|box_start|>", [], False, True),
        ("<|box_start|>(1,2)" + native("cat", "(1,2),(30,40)"),
         [("", None, False), ("cat", CAT_BOX, True)], False, False),
        (native("cat") + "<|box_start|>(1,2)" + native("", "(1,2),(30,40)"),
         [("cat", None, False), ("cat", CAT_BOX, True)], False, False),
        ("<|object_ref_start|>cat" + native("", "(1,2),(30,40)"), [("", CAT_BOX, False)], False, False),
        ("<|box_end|><|object_ref_end|>" + native("cat", "(1,2),(30,40)"), [("cat", CAT_BOX, True)], False, False),
        (CAT, [], False, False),
    ],
)  # fmt: skip
def test_native_answers(text, items, format_ok, truncated):
    answer = NATIVE.parse_boxes(text)
    assert found(answer) == items
    assert flags(answer) == (format_ok, truncated)


def test_native_spans():
    first, more = native("cat", "(1,2),(30,40)"), native("", "(5,6),(7,8)")
    text = "x" + first + more + native("dog", "bad")
    spans = [text[item.start : item.end] for item in NATIVE.parse_boxes(text).items]
    assert spans == [first, more, native("dog", "bad")]


# ---- anything at all -------------------------------------------------------------------------------------------------

PARTS = st.sampled_from(
    [
        *'{}[]",:\\\n` é\ud800',
        "```json",
        '"bbox_2d"',
        '"label"',
        '"cat"',
        "1",
        "-2.5",
        "1e400",
        "NaN",
        CAT,
        DOG,
        "(1,2),(3,4)",
    ]
    + ["<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"]
)


def check_any(text: str) -> None:
    for family in (JSON, NATIVE):
        answer = family.parse_boxes(text)
        last = 0
        for item in answer.items:
            assert isinstance(item, Item) and last <= item.start < item.end <= len(text)
            last = item.end
            if item.valid:
                x1, y1, x2, y2 = item.box
                assert item.label and all(map(math.isfinite, item.box)) and x1 <= x2 and y1 <= y2
        assert not (answer.format_ok and answer.truncated)
        if answer.format_ok:
            assert all(item.valid for item in answer.items)


@given(st.one_of(st.text(max_size=60), st.lists(PARTS, max_size=40).map("".join)))
@settings(max_examples=400, deadline=None)
def test_no_text_raises(text):
    check_any(text)


def test_mutated_answers_keep_the_untouched_objects():
    """Cut, doubled or overwritten anywhere: whole flat objects that are still in the text are still found."""
    rng, whole = random.Random(0), [f'{{"bbox_2d": [{i}, 2, 30, 40], "label": "c{i}"}}' for i in range(5)]
    text = "[" + ", ".join(whole) + "]"
    for _ in range(1500):
        at, size = rng.randrange(len(text)), rng.choice([0, 1, 1, 5, 60])
        broken = text[:at] + rng.choice(["", '"', "{", "}", "]", ",", "\\", "x"]) + text[at + size :]
        check_any(broken)
        labels = [item.label for item in JSON.parse_boxes(broken).items if item.valid]
        assert all(f"c{i}" in labels for i, each in enumerate(whole) if each in broken)
    for cut in range(len(text)):
        answer = JSON.parse_boxes(text[:cut])
        kept = sum(text.index(each) + len(each) <= cut for each in whole)
        assert len(answer.items) == kept and answer.truncated == (cut > 0) and not answer.format_ok


DEEP = 100_000
JUNK = {
    "deep brackets": "[" * DEEP,
    "deep braces": "{" * DEEP,
    "deep objects": '[{"a":' * DEEP,
    "a list in a box": '[{"bbox_2d": ' + "[" * DEEP,
    "a closed deep box": '{"bbox_2d": ' + "[" * DEEP + "}",
    "quotes": '{"' * DEEP,
    "escaped quotes": '[{"\\"' * DEEP,
    "spaces": "[" + " " * 1_000_000,
    "commas": '{"bbox_2d" ' + ", " * 500_000 + "}",
    "fences": "```json\n" * DEEP,
    "prose": "The quick brown fox, jumps over [the] lazy dog. " * 20_000,
    "digits": '[{"bbox_2d": [1' + "0" * 1_000_000,
    "box starts": "<|box_start|>" * 80_000,
    "phrases": "<|object_ref_start|>" * 50_000,
    "digits in a box": "<|box_start|>(" + "1" * 90_000 + "<|box_end|>",
    "spaces in a box": "<|box_start|>" + " " * 90_000 + "<|box_end|>",
    "an honest megabyte": "[" + ", ".join([CAT] * 22_000) + "]",
}


@pytest.mark.parametrize("name", sorted(JUNK))
def test_a_megabyte_of_junk_takes_no_time(name):
    """Linear: quadratic scanning of the same texts takes seconds to minutes. Best of three; usually below 50 ms."""
    times = []
    for _ in range(3):
        start = time.process_time()
        check_any(JUNK[name])
        times.append(time.process_time() - start)
    assert min(times) < 0.25, f"{min(times) * 1e3:.0f} ms"


def test_many_empty_objects_are_cheap_too():
    start = time.process_time()
    assert len(JSON.parse_boxes("{}" * 500_000).items) == 2_000
    assert time.process_time() - start < 1.5


def test_only_the_first_100_000_characters_count():
    text = "[" + ", ".join([CAT.replace("cat", "a cat with a long name")] * 3_000) + "]"
    answer = JSON.parse_boxes(text)
    assert not answer.format_ok and answer.truncated and answer.items[-1].end <= 100_000 < len(text)
    answer = NATIVE.parse_boxes(native("cat", "(1,2),(30,40)") * 1_900)
    assert not answer.format_ok and answer.items[-1].end <= 100_000


def test_only_the_first_2_000_objects_are_read():
    whole, more = (JSON.parse_boxes("[" + ", ".join([CAT] * n) + "]") for n in (1_999, 2_001))
    assert whole.format_ok and len(whole.items) == 1_999 and not more.format_ok and len(more.items) == 2_000
    whole, more = (NATIVE.parse_boxes(native("", *["(1,2),(3,4)"] * n)) for n in (1_999, 2_001))
    assert len(whole.items) == 1_999 and len(more.items) == 2_000 and not more.format_ok
