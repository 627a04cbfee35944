"""report.html of a run: its curves, its evaluations, and what the policy answers now and answered first.

One file with everything inside: no script, no external resource. Model output is untrusted: all text is escaped, and a
content policy forbids what an escape might miss. Null or missing metrics leave gaps, never an error.

    python -m pr1.report RUN_DIR
"""

from __future__ import annotations

import argparse
import base64
import binascii
import io
import json
import sys
from html import escape
from pathlib import Path

from PIL import Image

from pr1.charts import line_chart, number, short, stacked_chart
from pr1.lines import append_lines, read_lines, write_atomic

SAMPLES_SHOWN = 24
IMAGE_SIDE = 640  # longest side of an embedded image, pixels
FALLS_WHEN_BETTER = {"mae", "ed"}  # last word of an evaluation metric
OWN_CHARTS = ("reward", "reward_std", "kl", "entropy", "completion_tokens", "truncated", "flat_groups", "clipped",
              "logp_gap", "logp_gap_max", "grad_norm", "lr", "tokens_per_second")  # fmt: skip
STYLE = """
:root { color-scheme: light dark; --fg: #1c1e21; --bg: #fff; --soft: #656d76; --line: #d5d9de; --box: #f5f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --fg: #e4e6ea; --bg: #15171a; --soft: #9aa3ad; --line: #363b42; --box: #1e2125; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--fg); background: var(--bg); max-width: 1180px;
  margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; margin-bottom: .2em } h2 { font-size: 1.2em; margin-top: 2em }
p.facts, figcaption, .soft { color: var(--soft) } p.facts b { color: var(--fg); font-weight: 600 }
table { border-collapse: collapse } td, th { padding: .25em .9em .25em 0; text-align: left;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 1em }
figure { margin: 0; background: var(--box); border-radius: 8px; padding: .7em; min-width: 0 }
figure h3 { margin: 0 0 .3em; font-size: .95em; overflow-wrap: anywhere } figcaption { font-size: .8em }
svg { width: 100%; height: auto; display: block } svg text { fill: var(--soft); font: 11px system-ui, sans-serif }
svg .grid { stroke: var(--line); stroke-width: 1 } svg polyline { fill: none; stroke-width: 1.6 }
.sample { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1em; margin-bottom: 1.4em }
.sample svg { max-height: 460px }
.sample h3 { grid-column: 1 / -1; margin: 0; font-size: 1em; overflow-wrap: anywhere }
pre { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 12em; overflow: auto;
  font-size: 12px; margin: .5em 0 0 }
.gt { fill: none; stroke: #22c55e; stroke-dasharray: 6 4 } .pred { fill: none; stroke: #ff7a1a }
.gt, .pred { stroke-width: 2px; vector-effect: non-scaling-stroke }
svg text.label { paint-order: stroke; stroke: #000; stroke-width: .25em; font-weight: 600 }
svg text.label.on-gt { fill: #4ade80 } svg text.label.on-pred { fill: #ffa05c }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def add_samples(run_folder: Path | str, step: int, samples: list[dict]) -> None:
    """Append evaluation samples of `step` to samples.jsonl, by one write.

    samples: dicts with `id`; `width`, `height` (original pixels); `boxes` [{"label", "bbox"}], the truth; `items`
    [{"label", "bbox", "score"}], the predictions; `text`; `reward`; `expected`, the right text of tasks that have one; and the picture as `image_png_base64` (PNG or JPEG
    bytes) or as `image_file`, a path relative to the run folder. A bbox is xyxy in original pixels.
    """
    if samples:
        append_lines(Path(run_folder) / "samples.jsonl", [{**sample, "step": int(step)} for sample in samples])


def encode_image(image: Image.Image, side: int = IMAGE_SIDE) -> str:
    """A PIL image as base64 JPEG, its longest side at most `side` pixels: the `image_png_base64` of a sample."""
    image = image.convert("RGB")
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()


def write_report(run_folder: Path | str) -> Path:
    """Write report.html from config.json, metrics.jsonl and samples.jsonl as they are; a running run may be read.

    Returns its path. Raises ValueError when the folder holds none of the three.
    """
    folder = Path(run_folder)
    if not any((folder / name).is_file() for name in ("config.json", "metrics.jsonl", "samples.jsonl")):
        raise ValueError(f"{folder} holds no run: no config.json, metrics.jsonl or samples.jsonl there")
    record = _read_record(folder / "config.json")
    metrics = list(read_lines(folder / "metrics.jsonl"))
    body = [_headline(folder, record, metrics), _evaluation_table(metrics), _charts(metrics), _samples(folder)]
    body.append(f"<details><summary>Configuration</summary><pre>{escape(json.dumps(record, indent=2))}</pre></details>")
    title = escape(f"{record.get('task') or 'run'} · {folder.resolve().name}")
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body>\n{''.join(body)}\n</body></html>\n"
    )
    # "replace": JSON can carry half a surrogate pair, UTF-8 cannot
    write_atomic(folder / "report.html", [page.encode("utf-8", "replace")])
    return folder / "report.html"


def _read_record(file: Path) -> dict:
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _headline(folder: Path, record: dict, metrics: list[dict]) -> str:
    config, where = (record[k] if isinstance(record.get(k), dict) else {} for k in ("config", "environment"))
    trained = [line for line in metrics if number(line.get("reward")) is not None]
    git = where.get("git_hash")
    facts = {
        "task": record.get("task"),
        "model": config.get("model") or "embedded tiny policy",
        "steps": f"{max((line['step'] for line in trained), default=-1) + 1} of {config.get('steps', '?')}",
        "last reward": short(trained[-1]["reward"]) if trained else "none yet",
        "training time": _duration(sum(number(line.get("seconds")) or 0 for line in metrics)),
        "device": f"{where.get('world_size', '?')} × {where.get('device', 'unknown')}",
        "git": "no checkout" if not git else str(git)[:12] + (" + changes" if where.get("git_dirty") else ""),
        "torch": where.get("torch"),
        "transformers": where.get("transformers"),
        "started": record.get("created"),
        "resumed": f"{len(record['resumes'])}×" if record.get("resumes") else None,
    }
    told = " · ".join(f"{name} <b>{escape(str(value))}</b>" for name, value in facts.items() if value)
    return f'<h1>{escape(folder.resolve().name)}</h1><p class="facts">{told}</p>'


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds} s"


def _evaluation_table(metrics: list[dict]) -> str:
    rows = []
    for key in _keys(metrics, "eval/"):
        points = [(line["step"], line[key]) for line in metrics if number(line.get(key)) is not None]
        falls = key.rsplit("/", 1)[-1] in FALLS_WHEN_BETTER
        best = (min if falls else max)(points, key=lambda point: point[1])
        cells = "".join(
            f'<td>{short(value)} <span class="soft">step {step}</span></td>'
            for step, value in (points[0], best, points[-1])
        )
        rows.append(f"<tr><td>{escape(key)}{' (lower is better)' if falls else ''}</td>{cells}</tr>")
    if not rows:
        return ""
    head = "<tr><th>metric</th><th>first</th><th>best</th><th>last</th></tr>"
    return f"<h2>Evaluation</h2><table>{head}{''.join(rows)}</table>"


def _keys(metrics: list[dict], prefix: str = "") -> list[str]:
    """Keys with at least one number, in order of appearance."""
    found = {k: None for line in metrics for k, v in line.items() if k.startswith(prefix) and number(v) is not None}
    return [key for key in found if key != "step"]


def _charts(metrics: list[dict]) -> str:
    keys = _keys(metrics)
    if not keys:
        return "<h2>Curves</h2><p>No metrics yet.</p>"
    stages = [key for key in keys if key.startswith("seconds/")]
    grouped: dict[str, list[str]] = {}  # reward/a and reward/b share a chart, eval/ap and eval/ap50 do
    for key in keys:
        parent = key.rsplit("/", 1)[0]
        if key in stages or (stages and key == "seconds"):
            continue
        between = [number(line.get(key)) for line in metrics]
        share = parent != key and all(value is None or 0 <= value <= 1 for value in between)
        grouped.setdefault(f"{parent}/…" if share else key, []).append(key)
    order = {name: i for i, name in enumerate(("reward", "reward/…", "eval/…", *OWN_CHARTS[1:]))}
    names = sorted(grouped, key=lambda name: order.get(name, 2.5 if name.startswith(("reward/", "eval/")) else 99))
    charts = [line_chart(name, metrics, grouped[name]) for name in names]
    if stages:
        charts.append(stacked_chart("seconds by stage", metrics, stages, total="seconds"))
    return f'<h2>Curves</h2><div class="charts">{"".join(charts)}</div>'


def _samples(folder: Path) -> str:
    """The newest evaluated samples beside the same ones of the first evaluation."""
    file = folder / "samples.jsonl"
    steps = {sample["step"] for sample in read_lines(file)}
    if not steps:
        return ""
    first, newest = (
        {str(sample.get("id")): sample for sample in read_lines(file) if sample["step"] == step}
        for step in (min(steps), max(steps))
    )
    parts = []
    for name in list(newest)[:SAMPLES_SHOWN]:
        moments = [first.get(name), newest[name]]
        if moments[0] is None or moments[0]["step"] == moments[1]["step"]:
            moments = moments[1:]
        cells = "".join(_sample(folder, sample) for sample in moments)
        parts.append(f'<div class="sample"><h3>{escape(name)}</h3>{cells}</div>')
    more = f", {SAMPLES_SHOWN} of {len(newest)} shown" if len(newest) > SAMPLES_SHOWN else ""
    legend = f"Green, dashed: ground truth. Orange: prediction, with its score{more}."
    return f'<h2>Evaluation samples</h2><p class="soft">{legend}</p>{"".join(parts)}'


def _sample(folder: Path, sample: dict) -> str:
    reward = number(sample.get("reward"))
    caption = f"step {sample['step']}" + (f", reward {short(reward)}" if reward is not None else "")
    text = sample.get("text")
    expected = sample.get("expected")
    wanted = f'<pre class="soft">{escape(expected)}</pre>' if isinstance(expected, str) and expected else ""
    answer = f"<pre>{escape(text)}</pre>" if isinstance(text, str) and text else '<p class="soft">empty answer</p>'
    return f"<figure>{_picture(folder, sample)}<figcaption>{caption}</figcaption>{answer}{wanted}</figure>"


def _picture(folder: Path, sample: dict) -> str:
    jpeg, size = _load_image(folder, sample)
    width, height = (number(sample.get(name)) for name in ("width", "height"))
    if not width or not height or width < 0 or height < 0:
        width, height = size
    drawn = [f'<image href="data:image/jpeg;base64,{jpeg}" width="{width:g}" height="{height:g}"/>' if jpeg else ""]
    letter = max(width, height / 1.5) / 30
    for kind, boxes in (("gt", sample.get("boxes")), ("pred", sample.get("items"))):
        for box in boxes if isinstance(boxes, list) else []:
            drawn.append(_box(kind, box, letter))
    missing = "" if jpeg else '<p class="soft">image missing</p>'
    frame = f'viewBox="0 0 {width:g} {height:g}" role="img" aria-label="image with boxes"'
    return f"<svg {frame}>{''.join(drawn)}</svg>{missing}"


def _box(kind: str, box, letter: float) -> str:
    """A rectangle with its label, or nothing for a box without four finite numbers."""
    corners = box.get("bbox") if isinstance(box, dict) else None
    if not isinstance(corners, list) or len(corners) != 4 or any(number(c) is None for c in corners):
        return ""
    corners = [min(max(c, -1e6), 1e6) for c in corners]
    x, y = min(corners[0], corners[2]), min(corners[1], corners[3])
    w, h = abs(corners[2] - corners[0]), abs(corners[3] - corners[1])
    label, score = str(box.get("label", "")), number(box.get("score"))
    label = (label if len(label) <= 40 else label[:39] + "…") + (f" {score:.2f}" if score is not None else "")
    # the truth is named inside its lower edge, a prediction inside its upper one: on a hit both stay readable
    at = y + h - 0.3 * letter if kind == "gt" else y + letter
    text = f'<text class="label on-{kind}" x="{x + 0.2 * letter:.2f}" y="{at:.2f}" style="font-size:{letter:.1f}px">'
    rect = f'<rect class="{kind}" x="{x:.2f}" y="{y:.2f}" width="{w:.2f}" height="{h:.2f}"/>'
    return f"{rect}{text}{escape(label)}</text>"


def _load_image(folder: Path, sample: dict) -> tuple[str | None, tuple[int, int]]:
    """(base64 JPEG or None, (width, height)); decoding it here is what makes foreign bytes safe to embed."""
    try:
        if isinstance(sample.get("image_png_base64"), str):
            source = io.BytesIO(base64.b64decode(sample["image_png_base64"], validate=True))
        else:
            source = folder / str(sample["image_file"])
        with Image.open(source) as image:
            return encode_image(image), image.size
    except (KeyError, OSError, ValueError, binascii.Error, Image.DecompressionBombError, SyntaxError):
        return None, (640, 480)


def main(argv: list[str] | None = None) -> int:
    about = "Write report.html of a run, finished or running."
    parser = argparse.ArgumentParser(prog="python -m pr1.report", description=about, allow_abbrev=False)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="folder of the run")
    try:
        print(write_report(parser.parse_args(argv).run_dir))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
