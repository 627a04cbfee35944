"""Image files: what can be wrong with one is found before any long work begins."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from tqdm import tqdm

FULL_DECODE = 2000  # up to this many images are decoded whole when they are verified (some 10 ms each)
UNCONVERTIBLE = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # modes of which Pillow's convert("RGB") clips the values
# What a complete file ends with.
END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB\x60\x82"}
# What Pillow raises for files that are no images, are cut, or claim absurd sizes.
_BROKEN = (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError)


def load_image(path: str | Path | None, size: tuple[int, int]) -> Image.Image:
    """The stored pixels as RGB. Raises ValueError if the file is broken or not of `size` (width, height), or if there is
    none because the annotations were read alone."""
    if path is None:
        raise ValueError("these annotations were read without their images; give their folder (--images)")
    problem = _header_problem(path, size)
    if problem:
        raise ValueError(f"{path}: {problem}")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except _BROKEN as error:
        raise ValueError(f"{path}: the image cannot be decoded ({error}); replace the file") from error


def verify_images(where: str, sizes: Mapping[str | Path, tuple[int, int]]) -> None:
    """Every header's size (path -> (width, height)); every pixel of a small set, else the end of every file.

    Raises ValueError naming the first files that cannot be used, in the name of `where`. Pillow decodes without the GIL.
    """
    full = len(sizes) <= FULL_DECODE

    def check(path) -> str | None:
        return _header_problem(path, sizes[path]) or _content_problem(path, full)

    problems = []
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        checks = pool.map(check, sizes)
        for path, problem in zip(sizes, tqdm(checks, "checking images", len(sizes), disable=full), strict=True):
            if problem:
                problems.append(f"{os.path.basename(path)}: {problem}")
    if problems:
        shown = "\n  ".join(problems[:3])
        raise ValueError(f"{where}: {len(problems)} of {len(sizes)} image files cannot be used:\n  {shown}")


def read_size(where: str, path: str | Path) -> tuple[int, int]:
    """(width, height) from the header; ValueError in the name of `where` if there is no readable image."""
    if not os.path.isfile(path):
        raise ValueError(f"{where}: the image {path} does not exist; give the folder its path starts from (--images)")
    try:
        with Image.open(path) as image:
            return image.size
    except _BROKEN as error:
        raise ValueError(f"{where}: {path} is not a readable image ({error}); replace the file") from error


def _header_problem(path, size: tuple[int, int]) -> str | None:
    try:
        with Image.open(path) as image:
            found, mode = image.size, image.mode
    except _BROKEN as error:
        return f"not a readable image ({error}); replace the file"
    if found != tuple(size):
        return (f"the image is {found[0]}x{found[1]}, but annotated as {size[0]}x{size[1]}; give the images that were "
                "annotated, not resized or rotated copies (--images), or correct width and height")  # fmt: skip
    if mode in UNCONVERTIBLE:
        return f"its pixels are of mode {mode}, which 8-bit RGB would clip; convert the file to 8 bits"
    return None


def _content_problem(path, full: bool) -> str | None:
    try:
        with Image.open(path) as image:
            # A missing marker proves nothing (some cameras append data), so such a file is decoded as well.
            if full or not _ends_well(path, image.format):
                image.load()
    except _BROKEN as error:
        return f"the image is broken or truncated ({error}); replace the file"
    return None


def _ends_well(path, image_format: str | None) -> bool:
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 64))
        tail = file.read().rstrip(b"\0")
    marker = END_MARKERS.get(image_format or "")
    return marker is not None and tail.endswith(marker)
