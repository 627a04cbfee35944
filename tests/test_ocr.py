"""Page OCR: reading of the data, the reward and the word measures against slow references and hand-worked numbers."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pr1.data.pages import ALPHABET, FONT, PageOptions, RenderedPages, load_pages
from pr1.families import load_family
from pr1.records import Sample, TextTarget
from pr1.tasks import TASKS
from pr1.text_metric import page_metrics

OCR = TASKS["ocr"]
REAL = Path(__file__).resolve().parents[2] / "shared" / "data"


def sample(text: str) -> Sample:
    return Sample("page", "ocr", [], (), (), TextTarget(text))


def slow_distance(a: str, b: str) -> int:
    """Wagner and Fischer 1974, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def reward(text: str, wanted: str, task=OCR) -> float:
    values, parts = task.reward([[text]], [sample(wanted)])
    assert values.dtype == np.float32 and values.shape == (1, 1) and all(v.shape == (1, 1) for v in parts.values())
    return float(values[0, 0])


# ---- reward --------------------------------------------------------------------------------------------------------


def test_reward_equals_a_slow_reference():
    random.seed(0)
    raw = replace(OCR, preset="paper")
    for _ in range(1000):
        a, b = ("".join(random.choices("ab \n", k=random.randint(0, 12))) for _ in range(2))
        longest = max(len(a), len(b), 1)
        assert reward(a, b, raw) == pytest.approx(1 - slow_distance(a, b) / longest, abs=1e-6)
        a, b = " ".join(a.split()), " ".join(b.split())
        assert reward(a, b) == pytest.approx(1 - slow_distance(a, b) / max(len(a), len(b), 1), abs=1e-6)


def test_golden_numbers():
    assert reward("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert reward("two\n lines ", "two lines") == 1.0
    assert reward("two\nlines", "two lines", replace(OCR, preset="paper")) == pytest.approx(8 / 9)
    assert reward("", "") == 1.0 and reward("", "a") == 0.0 and reward("a", "") == 0.0


def test_what_is_beyond_the_cut_counts_as_edits():
    wanted = "ab" * 50
    limit = 4 * len(wanted) + 1000
    long = wanted + "z" * 10**6
    assert reward(long, wanted) == pytest.approx(100 / len(long), rel=1e-5)
    assert reward("z" * limit + wanted, wanted) == 0.0  # the right text behind the cut is worth nothing


def test_thinking_halves_an_answer_without_the_form():
    task = replace(OCR, thinking=True)
    assert task.answer(sample("AB")) == "<think></think><answer>AB</answer>"
    assert reward("<think>hm</think><answer>AB</answer>", "AB", task) == 1.0
    assert reward("<think>\nhm\n</think>\n<answer>AX</answer>", "AB", task) == 0.5
    assert reward("AB", "AB", task) == 0.5
    assert reward("<think>AB</think>AX", "AB", task) == 0.25
    assert reward("<answer>AB</answer>", "AB", task) == 0.5
    assert reward("<think><think></think><answer>AB</answer>", "AB", task) == 0.5
    assert reward("<think></think><answer></answer>", "AB", task) == 0.0
    assert task.messages(None)[0]["content"][1]["text"].startswith("OCR this image. Output the thinking process in")


def test_ladders_fall_and_zeros_are_zero():
    rng = random.Random(1)
    texts = ["", "A", "AB", "one two", *("".join(rng.choices("abc de", k=k)).strip() for k in (5, 20, 300))]
    for task in (OCR, replace(OCR, thinking=True)):
        for wanted in texts:
            for name, rungs in task.ladders(sample(wanted)).items():
                rungs = list(dict.fromkeys(rungs))
                values = [reward(rung, wanted, task) for rung in rungs]
                assert values[0] == 1.0, (wanted, name)
                assert all(a > b or a == b == 0 for a, b in zip(values, values[1:], strict=False)), (
                    wanted,
                    name,
                    values,
                )
            assert all(reward(text, wanted, task) == 0 for text in task.zeros(sample(wanted)).values())


def test_weights_act_or_fail():
    task = replace(OCR, weights=(("length_ratio", 0.5), ("similarity", 0.25)))
    assert reward("ab", "abcd", task) == pytest.approx(0.5 * 0.5 + 0.25 * 0.5)
    with pytest.raises(ValueError, match="--reward-weights names 'f1'"):
        replace(OCR, weights=(("f1", 1.0),))


def test_unequal_groups_are_refused():
    with pytest.raises(ValueError, match="2 groups"):
        OCR.reward([["a"], ["a", "b"]], [sample("a"), sample("b")])


# ---- measures ------------------------------------------------------------------------------------------------------


def test_page_metrics_by_hand():
    """4 of 5 found words are among the 7 wanted ones."""
    m = page_metrics("the cat sat on mats", "the cat sat on a red mat", synonyms=False)
    assert (m["precision"], m["recall"]) == (pytest.approx(4 / 5), pytest.approx(4 / 7))
    assert m["f1"] == pytest.approx(2 * 0.8 * (4 / 7) / (0.8 + 4 / 7))
    assert m["ed"] == pytest.approx(slow_distance("the cat sat on mats", "the cat sat on a red mat") / 24)
    # n-grams found: 4/5, 3/4, 2/3, 1/2; brevity penalty exp(1 - 7/5)
    assert m["bleu"] == pytest.approx(math.exp(1 - 7 / 5) * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    # "mats" is a stem match: 5 of 5 and of 7, in 2 chunks; alpha .9, beta 3, gamma .5 (Lavie and Agarwal 2007)
    f, penalty = 1 * (5 / 7) / (0.9 * 1 + 0.1 * (5 / 7)), 0.5 * (2 / 5) ** 3
    assert m["meteor_stem"] == pytest.approx(f * (1 - penalty), abs=1e-9) and "meteor" not in m


def test_page_metrics_at_the_ends():
    exact = page_metrics("a b c d", "a  b\nc d", synonyms=False)
    assert exact == {"ed": 0, "f1": 1, "precision": 1, "recall": 1, "bleu": 1, "meteor_stem": pytest.approx(0.9921875)}
    for found, wanted in (("", "a"), ("a", ""), ("b", "a")):
        m = page_metrics(found, wanted, synonyms=False)
        assert m["ed"] == 1 and m["f1"] == m["bleu"] == m["meteor_stem"] == 0
    assert page_metrics("", "", synonyms=False)["f1"] == 1
    assert page_metrics("你好", "你们好", synonyms=False)["recall"] == pytest.approx(2 / 3)  # by characters


def test_evaluate_counts_a_missing_page_as_empty():
    records = [replace_record(i, text) for i, text in enumerate(["ab", "cd"])]
    metrics = OCR.evaluate([{"id": "0", "text": "ab", "items": []}], records)
    assert metrics["ed"] == 0.5 and metrics["f1"] == 0.5
    with pytest.raises(ValueError, match="'9'"):
        OCR.evaluate([{"id": "9", "text": "ab"}], records)


def replace_record(index: int, text: str):
    return replace(RenderedPages("val", 9, PageOptions.at(0))[index], id=str(index), target=TextTarget(text))


# ---- data ----------------------------------------------------------------------------------------------------------


def pages(tmp_path, *lines) -> Path:
    Image.new("1", (30, 20)).save(tmp_path / "a.png")
    Image.new("RGB", (40, 20)).save(tmp_path / "b.png")
    file = tmp_path / "pages.jsonl"
    file.write_text("\n".join(json.dumps(x) if not isinstance(x, str) else x for x in lines), encoding="utf-8")
    return file


def test_pages_are_read(tmp_path):
    file = pages(tmp_path, {"image": "a.png", "text": "ü"}, "", {"image": "b.png", "text": "", "id": "second"})
    said = []
    data = load_pages(file, tmp_path, log=said.append)
    assert [(r.id, r.width, r.height, r.target.text) for r in data] == [("a.png", 30, 20, "ü"), ("second", 40, 20, "")]
    assert data[0].load().mode == "RGB" and len(data[:1]) == 1 and "2 pages" in said[0]
    alone = load_pages(file, None, log=said.append)
    with pytest.raises(ValueError, match="--images"):
        alone[0].load()


@pytest.mark.parametrize("lines, says", [
    ([], "no pages"),
    (["{"], "line 1: not JSON"),
    ([{"image": "a.png"}], "line 1"),
    ([{"image": "a.png", "text": 3}], "line 1"),
    ([{"image": "a.png", "text": "x"}, {"image": "none.png", "text": "x"}], "line 2.*none.png does not exist"),
    ([{"image": "a.png", "text": "x"}, {"image": "a.png", "text": "y"}], "line 2.*line 1 already"),
    ([{"image": "pages.jsonl", "text": "x"}], "not a readable image"),
])  # fmt: skip
def test_bad_pages_are_named(tmp_path, lines, says):
    with pytest.raises(ValueError, match=says):
        load_pages(pages(tmp_path, *lines), tmp_path, log=print)


def test_a_cut_image_is_found(tmp_path):
    file = pages(tmp_path, {"image": "c.png", "text": "x"})
    Image.effect_noise((90, 90), 50).save(tmp_path / "c.png")
    whole = (tmp_path / "c.png").read_bytes()
    (tmp_path / "c.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="c.png: the image is broken"):
        load_pages(file, tmp_path, log=print)


def test_rendered_pages_show_their_text():
    """The dots of every letter are found where the text says: the page is read back by comparing with the font."""
    data = RenderedPages("val", 60, PageOptions.at(0.5))
    glyphs = {tuple(FONT[c]): c for c in ALPHABET}
    assert len(glyphs) == len(ALPHABET) == 24
    for i in range(60):
        record = data[i]
        page = np.asarray(record.load()).astype(int).sum(2)
        dark = page < (page.min() + np.median(page)) / 2
        rows, columns = (np.flatnonzero(dark.any(axis)) for axis in (1, 0))
        top, left = rows[0], columns[0]
        found = []
        for line in range(len(record.target.text.split("\n"))):
            letters = ""
            for column in range(9):
                y, x = top + 27 * line + 1, left + 18 * column + 1
                cell = dark[y : y + 21 : 3, x : x + 15 : 3]
                cell = np.pad(cell, ((0, 7 - cell.shape[0]), (0, 5 - cell.shape[1])))
                bits = tuple(int(v) for v in cell @ (1 << np.arange(5)[::-1]))
                letters += glyphs.get(bits, " " if not any(bits) else "?")
            found.append(letters.rstrip())
        if all(line[0] not in "37TYVXZ247SCE" for line in record.target.text.split("\n")):  # left edge is the letter's
            assert "\n".join(found) == record.target.text


def test_rendered_pages_are_the_same_again_and_differ_by_split():
    a, b = (RenderedPages(split, 50, PageOptions.at(1)) for split in ("train", "val"))
    assert np.array_equal(np.asarray(a[7].load()), np.asarray(RenderedPages("train", 50, PageOptions.at(1))[7].load()))
    assert [a[i].target.text for i in range(50)] != [b[i].target.text for i in range(50)]
    assert len({a[i].target.text for i in range(50)}) > 45
    twice = OCR.rendered("train", 50, 1, duplicates=1.0)
    for i in range(50):
        lines = a[i].target.text.split("\n")
        assert twice[i].target.text.split("\n") == [line for line in lines for _ in range(2)]
        assert np.array_equal(np.asarray(a[i].load()), np.asarray(twice[i].load()))


@pytest.mark.parametrize("name", ["old_books", "tesseract_pages"])
def test_real_pages_end_to_end(name, tmp_path):
    """Converted, loaded, encoded by the embedded policy's family; the exact answer is worth 1, another page's is not."""
    from pr1.assemble import ASSETS
    from pr1.data.convert import convert_pages

    if not (REAL / name).is_dir():
        pytest.skip(f"{REAL / name} is absent")
    (file,) = convert_pages(REAL / name, tmp_path)
    data = load_pages(file, tmp_path, log=print)
    family = load_family(str(ASSETS / "tiny-qwen2.5-vl"), max_pixels=50_000)
    built = [OCR.build(data[i], family) for i in range(2)]
    prompt = family.encode(built[0])
    assert prompt.images[0].grid[1] * prompt.images[0].grid[2] * 196 <= 50_000
    answers = [OCR.answer(s) for s in built]
    values, _ = OCR.reward([answers, answers], built)
    assert values[0, 0] == values[1, 1] == 1 and values[0, 1] < 0.5 and values[1, 0] < 0.5
    metrics = OCR.evaluate([{"id": s.id, "text": a} for s, a in zip(built, answers, strict=True)], data[:2])
    assert metrics["ed"] == 0 and metrics["bleu"] == pytest.approx(1) and metrics.get("meteor_stem", 1) > 0.99
