"""report.html: what it draws is what the run wrote, nothing in it can act, and nothing missing breaks it."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from pr1 import charts
from pr1.report import add_samples, encode_image, main, write_report

ROOT = Path(__file__).resolve().parent.parent


class Page(HTMLParser):
    """The elements of a page: tag, attributes, text directly inside, parent. Checks that they nest."""

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "attrs": dict(attrs), "text": "", "parent": self.open[-1] if self.open else None}
        self.elements.append(element)
        if tag != "meta":
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        if self.open:
            self.open[-1]["text"] += data

    def all(self, tag, within=None, **attrs):
        attrs = {key.rstrip("_"): value for key, value in attrs.items()}
        found = [e for e in self.elements if e["tag"] == tag and attrs.items() <= e["attrs"].items()]
        return [e for e in found if within is None or any(above is within for above in ancestors(e))]

    def figure(self, title):
        (heading,) = [e for e in self.all("h3") if e["text"] == title]
        return heading["parent"]

    def said(self, tag):
        return [e["text"] for e in self.all(tag)]


def ancestors(element):
    found = []
    while element["parent"] is not None:
        element = element["parent"]
        found.append(element)
    return found


def report(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def write_metrics(folder: Path, rows: list, tail: str = "") -> None:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def scale(page: Page, figure: dict, axis: str):
    """Pixel -> value along an axis, read off the labels of two ticks as a person would."""
    ticks = page.all("text", within=figure, class_=axis)
    (v0, p0), (v1, p1) = ((float(t["text"]), float(t["attrs"][axis])) for t in (ticks[0], ticks[-1]))
    return lambda pixel: v0 + (pixel - p0) * (v1 - v0) / (p1 - p0)


def points_of(element: dict) -> list[tuple[float, float]]:
    return [tuple(map(float, point.split(","))) for point in element["attrs"]["points"].split()]


def drawn_values(page: Page, figure: dict, element: dict) -> list[tuple[float, float]]:
    x, y = scale(page, figure, "x"), scale(page, figure, "y")
    return [(x(px), y(py)) for px, py in points_of(element)]


# --- curves ----------------------------------------------------------------------------------------------------------


def test_a_curve_read_off_its_axes_is_the_data(tmp_path):
    data = [(step, 0.2 + 0.6 * math.sin(step / 7) ** 2) for step in range(40)]
    write_metrics(tmp_path, [{"step": s, "reward": v, "grad_norm": 1e-4 * v} for s, v in data])
    page = report(tmp_path)
    for name, unit in (("reward", 1.0), ("grad_norm", 1e-4)):
        (line,) = page.all("polyline", within=page.figure(name))
        drawn = drawn_values(page, page.figure(name), line)
        assert len(drawn) == 40
        for (x, y), (step, value) in zip(drawn, data, strict=True):
            assert abs(x - step) < 0.01 and abs(y - unit * value) < 0.001 * unit  # coordinates have two decimals


def test_nulls_interrupt_a_curve_and_evaluations_are_joined(tmp_path):
    rows = [{"step": s, "kl": [0.1, 0.2, None, 0.3, 0.4, None, 0.5][s]} for s in range(7)]
    for step in (0, 3, 6):
        rows[step]["eval/ap"] = 0.1 * step
    write_metrics(tmp_path, rows)
    page = report(tmp_path)
    kl = page.figure("kl")
    assert [len(points_of(line)) for line in page.all("polyline", within=kl)] == [2, 2]
    assert len(page.all("circle", within=kl)) == 1
    (line,) = page.all("polyline", within=page.figure("eval/…"))
    assert [round(x, 1) for x, _ in drawn_values(page, page.figure("eval/…"), line)] == [0, 3, 6]


def test_parts_share_a_chart_and_what_exceeds_one_stands_alone(tmp_path):
    rows = [{"step": s, "reward": 0.5, "reward/box": 0.1 * s, "reward/label": 0.2, "eval/acc": 0.5, "eval/mae": 3.0 - s,
             "made_up": s} for s in range(3)]  # fmt: skip
    write_metrics(tmp_path, rows)
    page = report(tmp_path)
    assert page.said("h3") == ["reward", "reward/…", "eval/…", "eval/mae", "made_up"]
    lines = page.all("polyline", within=page.figure("reward/…"))
    assert [page.all("title", within=line)[0]["text"] for line in lines] == ["reward/box", "reward/label"]


def test_stages_are_stacked_up_to_the_total(tmp_path):
    rows = [{"step": s, "seconds": 10.0 + s, "seconds/rollout": 4.0, "seconds/update": 3.0 + s} for s in range(5)]
    write_metrics(tmp_path, rows)
    page = report(tmp_path)
    figure = page.figure("seconds by stage")
    layers = page.all("polygon", within=figure)
    assert [page.all("title", within=layer)[0]["text"] for layer in layers] == ["rollout", "update", "other"]
    tops = [[y for _, y in drawn_values(page, figure, layer)][:5] for layer in layers]
    for s in range(5):
        assert [round(top[s], 1) for top in tops] == [4.0, 7.0 + s, 10.0 + s]


def test_long_runs_are_drawn_as_means(tmp_path):
    write_metrics(tmp_path, [{"step": s, "reward": float(s % 2)} for s in range(2500)])
    page = report(tmp_path)
    figure = page.figure("reward")
    (line,) = page.all("polyline", within=figure)
    values = charts.thin([(s, float(s % 2)) for s in range(2500)])
    assert len(points_of(line)) == len(values) == 834 and values[0] == (1.0, 1 / 3) and values[-1] == (2499.0, 1.0)
    assert "mean of several steps" in page.all("figcaption", within=figure)[0]["text"]


def test_ticks_are_round_and_inside():
    assert charts.ticks(0, 1, 4) == pytest.approx([0, 0.5, 1])
    assert charts.ticks(-0.013, 0.021, 4) == pytest.approx([-0.01, 0, 0.01, 0.02])
    for low, high in ((0, 7), (-3e-7, 2e-7), (123456, 123999), (0, 1e12)):
        ticks = charts.ticks(low, high, 4)
        assert 2 <= len(ticks) <= 6 and all(low - 1e-9 <= t <= high + 1e-9 for t in ticks)


def test_evaluation_table_knows_which_way_is_better(tmp_path):
    ap, mae = [0.1, 0.4, None, 0.3], [5.0, 2.0, 3.0, 4.0]
    write_metrics(tmp_path, [{"step": 10 * i, "eval/ap": ap[i], "eval/mae": mae[i]} for i in range(4)])
    page = report(tmp_path)
    cells = [re.sub(r"\s+", " ", cell["text"]).strip() for cell in page.all("td")]
    notes = [span["text"] for span in page.all("span") if span["parent"]["tag"] == "td"]
    assert cells == ["eval/ap", "0.1", "0.4", "0.3", "eval/mae (lower is better)", "5", "2", "4"]
    assert notes == ["step 0", "step 10", "step 30", "step 0", "step 10", "step 30"]


# --- samples ---------------------------------------------------------------------------------------------------------


def a_sample(name="img", **changes):
    image = Image.new("RGB", (200, 100), (200, 30, 30))
    return {
        "id": name, "image_png_base64": encode_image(image), "width": 400, "height": 200, "text": "an answer",
        "reward": 0.5,
        "boxes": [{"label": "cat", "bbox": [10, 20, 110, 70]}, {"label": "dog", "bbox": [200, 20, 300.5, 70]}],
        "items": [{"label": "cat", "bbox": [12, 22, 108, 66], "score": 0.875}],
    } | changes  # fmt: skip


def test_boxes_are_drawn_where_they_are(tmp_path):
    add_samples(tmp_path, 0, [a_sample()])
    page = report(tmp_path)
    (svg,) = page.all("svg")
    assert svg["attrs"]["viewbox"] == "0 0 400 200"  # original pixels, whatever the thumbnail's size
    (image,) = page.all("image")
    assert (image["attrs"]["width"], image["attrs"]["height"]) == ("400", "200")
    jpeg = Image.open(io.BytesIO(base64.b64decode(image["attrs"]["href"].split(",")[1])))
    assert jpeg.size == (200, 100) and abs(jpeg.getpixel((9, 9))[0] - 200) < 5
    sides = ("x", "y", "width", "height")
    rects = [(r["attrs"]["class"], *(float(r["attrs"][side]) for side in sides)) for r in page.all("rect")]
    assert rects == [("gt", 10, 20, 100, 50), ("gt", 200, 20, 100.5, 50), ("pred", 12, 22, 96, 44)]
    assert [t["text"] for t in page.all("text")] == ["cat", "dog", "cat 0.88"]
    assert page.said("pre")[0] == "an answer" and "step 0, reward 0.5" in page.said("figcaption")


def test_newest_evaluation_stands_beside_the_first(tmp_path):
    for step in (0, 50, 100):
        add_samples(tmp_path, step, [a_sample("a", text=f"a at {step}"), a_sample("b", text=f"b at {step}")])
    add_samples(tmp_path, 100, [a_sample("new", text="new at 100")])
    page = report(tmp_path)
    assert page.said("pre")[:-1] == ["a at 0", "a at 100", "b at 0", "b at 100", "new at 100"]
    assert len(page.all("rect")) == 5 * 3


def test_many_samples_are_cut_and_said_so(tmp_path):
    add_samples(tmp_path, 0, [a_sample(f"s{i}", boxes=[], items=[]) for i in range(30)])
    page = report(tmp_path)
    assert len(page.all("image")) == 24 and any("24 of 30 shown" in text for text in page.said("p"))


def test_model_output_cannot_act(tmp_path):
    attack = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>\"'>&amp;"
    sample = a_sample(attack, text=attack, items=[{"label": attack, "bbox": [0, 0, 9, 9], "score": attack}])
    add_samples(tmp_path, 0, [sample])
    write_metrics(tmp_path, [{"step": s, f"reward/{attack}": 0.5, "reward/x": 1.0, attack: 2.0} for s in range(3)])
    (tmp_path / "config.json").write_text(json.dumps({"task": attack, "config": {"model": attack}, "environment": {}}))
    html = write_report(tmp_path).read_text()
    page = Page(html)
    assert not page.all("script") and not page.all("img") and "<script" not in html
    assert page.said("pre")[0] == attack and attack[:39] + "…" in page.said("text")
    assert any(attack in text for text in page.said("b"))


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    add_samples(tmp_path, 0, [a_sample(text="see https://example.com")])
    write_metrics(tmp_path, [{"step": s, "reward": 0.5, "seconds": 2.0, "seconds/rollout": 1.0} for s in range(3)])
    html = write_report(tmp_path).read_text()
    page = Page(html)
    loads = ("src", "href", "xlink:href", "data")
    used = [value for e in page.elements for key, value in e["attrs"].items() if key in loads]
    assert used and all(value.startswith("data:image/jpeg;base64,") for value in used)
    assert not page.all("link") and not page.all("script") and "url(" not in html and "@import" not in html
    assert "default-src 'none'" in html and "prefers-color-scheme: dark" in html


def test_image_files_and_what_cannot_be_drawn(tmp_path):
    Image.new("RGB", (3000, 1500)).save(tmp_path / "big.png")
    no_boxes = ([1, 2, 3], None, [1, 2, None, 4], ["1", 2, 3, 4], [True, 1, 2, 3], "1234")
    bad = [{"label": "x", "bbox": corners} for corners in no_boxes]
    file = {"image_png_base64": None, "image_file": "big.png", "width": 3000, "height": 1500}
    add_samples(tmp_path, 0, [
        a_sample("file", **file, items=[*bad, 7, {"bbox": [30, 40, 10, 20]}]),
        a_sample("gone", image_png_base64=None, image_file="no.png", boxes=None, items={}),
        a_sample("junk", image_png_base64='AAAA"><script>', width=None, height=-3, text=None, reward=math.nan),
        a_sample("surrogate", text="half a pair: \ud83d and \x00", boxes=[], items=[]),
    ])  # fmt: skip
    page = report(tmp_path)
    first = page.figure("file")
    jpeg = page.all("image", within=first)[0]["attrs"]["href"]
    assert Image.open(io.BytesIO(base64.b64decode(jpeg.split(",")[1]))).size == (640, 320)
    (drawn,) = page.all("rect", within=first, class_="pred")  # corners in any order
    assert [drawn["attrs"][k] for k in ("x", "y", "width", "height")] == ["10.00", "20.00", "20.00", "20.00"]
    assert page.said("p").count("image missing") == 2 and "empty answer" in page.said("p")
    assert any(text.startswith("half a pair: ?") for text in page.said("pre"))


def test_a_partial_line_does_not_swallow_the_next_sample(tmp_path):
    add_samples(tmp_path, 0, [a_sample("a")])
    with open(tmp_path / "samples.jsonl", "ab") as file:
        file.write(b'{"step": 1, "id": "b", "ima')
    add_samples(tmp_path, 2, [a_sample("c", reward=math.inf)])
    add_samples(tmp_path, 3, [])
    page = report(tmp_path)
    assert [e["text"] for e in page.all("h3")] == ["c"]
    assert (tmp_path / "samples.jsonl").read_bytes().count(b"\n") == 3


# --- robustness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 0}],
        [{"step": 0, "reward": None, "kl": None}],
        [{"step": 0, "reward": 0.0, "seconds": 1.0, "seconds/rollout": 0.5}],
        [{"step": s, "reward": 1e300 * (-1) ** s, "kl": 1e-320 * s, "lr": 10**400, "clipped": 5e-324} for s in (0, 1)],
        [{"step": s, "reward": "text", "kl": [1], "lr": True} for s in range(3)],
        [{"step": 5, "reward": 1.0}, {"step": 5, "reward": 2.0}, {"step": 3, "reward": 0.5}],
        [{"step": 10**15 + s, "reward": 1.0, "seconds/a": -1.0} for s in range(2)],
    ],
)
def test_odd_metrics_do_not_break_it(tmp_path, rows):
    write_metrics(tmp_path, rows, tail='{"step": 9, "rewa')
    html = write_report(tmp_path).read_text()
    Page(html)
    assert not re.search(r'(?:points|x|y|cx|cy|width|height)="[^"]*(?:nan|inf)', html)


def test_odd_configs_do_not_break_it(tmp_path):
    for record in ("", "[1]", '{"config": 3, "environment": null, "task": ["x"]}'):
        (tmp_path / "config.json").write_text(record)
        report(tmp_path)


def test_headline(tmp_path):
    write_metrics(tmp_path, [{"step": s, "reward": 0.25 * s, "seconds": 100.0} for s in range(3)])
    where = {"git_hash": "0123456789abcdef", "git_dirty": True, "torch": "2.13.0", "world_size": 8, "device": "H100"}
    record = {"task": "det", "created": "2026-01-02T03:04:05+0000", "resumes": [{}], "environment": where,
              "config": {"model": None, "steps": 10}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(record))
    told = report(tmp_path).said("b")
    assert told == ["det", "embedded tiny policy", "3 of 10", "0.5", "5 min 0 s", "8 × H100", "0123456789ab + changes",
                    "2.13.0", "2026-01-02T03:04:05+0000", "1×"]  # fmt: skip


def test_command_line(tmp_path, capsys):
    write_metrics(tmp_path / "run", [{"step": 0, "reward": 1.0}])
    command = [sys.executable, "-m", "pr1.report", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "run" / "report.html")
    assert main([str(tmp_path / "none")]) == 2
    assert "none holds no run" in capsys.readouterr().err
