"""Annotations in other layouts -> the files the tasks read.

    python -m pr1.data.convert voc DIR OUT      PASCAL VOC (Annotations/*.xml) -> COCO instances JSON, one per image set
    python -m pr1.data.convert pages DIR OUT    page images with text files of the same name -> JSONL {"image", "text"}

OUT is a folder; files already there are replaced whole or not at all. Nothing is dropped silently.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from pr1.lines import write_atomic

IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")


def _number(where: str, node, path: str) -> float:
    try:
        return float(node.findtext(path))
    except (TypeError, ValueError):
        raise ValueError(f"{where}: <{path}> is {node.findtext(path)!r}, a number is expected") from None


def read_voc(file: Path) -> tuple[dict, list[dict]]:
    """(COCO image entry without id, its annotations without ids, labels as `name`) of a VOC file.

    VOC's pixels count from 1 and its boxes hold their last pixel: x1 = xmin - 1, x2 = xmax. Objects marked difficult
    become crowd regions, which no metric counts either way. Raises ValueError naming the file and what is wrong.
    """
    try:
        root = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not a VOC file ({error})") from None
    name = root.findtext("filename")
    if not name:
        raise ValueError(f"{file}: <filename> is missing")
    image = {"file_name": name, "width": int(_number(f"{file}", root, "size/width")),
             "height": int(_number(f"{file}", root, "size/height"))}  # fmt: skip
    annotations = []
    for number, node in enumerate(root.iter("object"), 1):
        where = f"{file}, object {number}"
        label = (node.findtext("name") or "").strip()
        if not label:
            raise ValueError(f"{where}: <name> is missing")
        x1, y1, x2, y2 = (_number(where, node, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax"))
        w, h = (x2 - x1 + 1 if x2 > x1 else 0.0), (y2 - y1 + 1 if y2 > y1 else 0.0)
        annotations.append({"name": label, "bbox": [x1 - 1, y1 - 1, w, h], "area": w * h,
                            "iscrowd": int((node.findtext("difficult") or "0").strip() == "1")})  # fmt: skip
    return image, annotations


def image_sets(folder: Path) -> dict[str, list[str]]:
    """Name of each list in ImageSets/Main or ImageSets -> the file stems in it; all of Annotations without lists."""
    lists = sorted(folder.glob("ImageSets/Main/*.txt")) or sorted(folder.glob("ImageSets/*.txt"))
    if lists:
        return {
            file.stem: [line.split()[0] for line in file.read_text().splitlines() if line.strip()] for file in lists
        }
    return {"all": sorted(file.stem for file in (folder / "Annotations").glob("*.xml"))}


def convert_voc(folder: Path, out: Path) -> list[Path]:
    """Writes out/instances_SET.json for each image set; categories are the same, sorted by name, in all of them.

    Boxes without area stay: the loader counts and drops them. Raises ValueError naming file and remedy.
    """
    sets = image_sets(folder)
    stems = sorted({stem for names in sets.values() for stem in names})
    if not stems:
        raise ValueError(f"{folder}: no Annotations/*.xml there; give the folder that holds Annotations and JPEGImages")
    parsed = {stem: read_voc(folder / "Annotations" / f"{stem}.xml") for stem in stems}
    labels = sorted({a["name"] for _, annotations in parsed.values() for a in annotations})
    ids = {label: i for i, label in enumerate(labels, 1)}
    written = []
    for name, members in sets.items():
        images, annotations = [], []
        for image_id, stem in enumerate(members, 1):
            image, objects = parsed[stem]
            images.append({"id": image_id, **image})
            for entry in objects:
                entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": ids[entry["name"]], **entry}
                annotations.append({key: value for key, value in entry.items() if key != "name"})
        categories = [{"id": i, "name": label} for label, i in ids.items()]
        file = out / f"instances_{name}.json"
        write_atomic(
            file, [json.dumps({"images": images, "annotations": annotations, "categories": categories}).encode()]
        )
        print(f"{file}: {len(images)} images, {len(annotations)} objects, {len(labels)} classes")
        written.append(file)
    return written


def convert_pages(folder: Path, out: Path) -> list[Path]:
    """Writes out/pages.jsonl: every image under `folder` with the text file of its name (NAME.txt or NAME.gold.txt).

    Image paths are relative to `out`. Raises ValueError for an image without text or with two, and for text that is not
    UTF-8.
    """
    images = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES)
    if not images:
        raise ValueError(f"{folder}: no page images there ({', '.join(IMAGES)})")
    texts: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*.txt")):
        texts.setdefault(file.name.removesuffix(".txt").removesuffix(".gold"), []).append(file)
    lines = []
    for image in images:
        found = texts.get(image.stem, [])
        if len(found) != 1:
            what = "no text file" if not found else f"{len(found)} text files ({', '.join(map(str, found))})"
            raise ValueError(f"{image}: {what} of its name; one {image.stem}.txt is expected")
        try:
            text = found[0].read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{found[0]}: not UTF-8 ({error}); convert it") from None
        path = os.path.relpath(image.resolve(), out.resolve())
        lines.append(json.dumps({"id": image.stem, "image": path, "text": text.strip()}, ensure_ascii=False))
    file = out / "pages.jsonl"
    write_atomic(file, [(line + "\n").encode() for line in lines])
    print(f"{file}: {len(lines)} pages")
    return [file]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pr1.data.convert", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("kind", choices=("voc", "pages"))
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("out", type=Path, metavar="OUT")
    options = parser.parse_args(argv)
    try:
        if not options.folder.is_dir():
            raise ValueError(f"{options.folder}: no such folder")
        options.out.mkdir(parents=True, exist_ok=True)
        {"voc": convert_voc, "pages": convert_pages}[options.kind](options.folder, options.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
