"""Writes prompts.json: what transformers' own processors and models make of a few prompts.

Run from anywhere with an interpreter that has torch, torchvision and transformers (the processors insist on torchvision
although the PIL image backend is used): `python tests/golden/make_golden.py`. It imports nothing of the package, so
that the file is an independent truth. The pixels are hashed as the 8-bit values that they come from, because float32
values may differ in their last bit between machines; a few of them are kept as floats.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL.Image import Image
from transformers import AutoTokenizer, Qwen2_5_VLProcessor, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from tiny_models import make_tiny, messages, picture  # noqa: E402  (the folder of the tests must be on the path first)

SIZES = ((168, 140), (252, 364), (97, 311))  # width, height: several attention windows, ragged at the edge; resized
CASES = {
    "one image, 168x140": ((0,), "Output the bounding box of the red circle in the image."),
    "one image, 252x364": ((1,), "Please output bbox coordinates and names of cat, dog."),
    "one image, 97x311": ((2,), "OCR this image. Größe: 12 µm – «läßt» 图像"),
    "two images": ((0, 2), "Output the bounding box of the cat in the image."),
    "two images, large first": ((1, 0), "Output the bounding box of the dog in the image."),
}


def pixel_bytes(values: np.ndarray, mean, std) -> bytes:
    """(patches, 3*2*14*14) normalised float values -> the 8-bit values they come from."""
    values = values.astype(np.float64).reshape(len(values), 3, -1)
    eight = (values * np.asarray(std)[:, None] + np.asarray(mean)[:, None]) * 255
    return np.rint(eight).astype(np.uint8).tobytes()


def make_case(processor, model, images: list[Image], text: str) -> dict:
    prompt = processor.apply_chat_template(messages(len(images), text), tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[prompt], images=images, return_tensors="pt")
    kinds = inputs["mm_token_type_ids"]
    positions, _ = model.model.get_rope_index(inputs["input_ids"], kinds, image_grid_thw=inputs["image_grid_thw"])
    values = inputs["pixel_values"].numpy()
    spec = processor.image_processor
    step = max(1, values.size // 8)
    return {
        "ids": inputs["input_ids"][0].tolist(),
        "grids": inputs["image_grid_thw"].tolist(),
        "positions": positions[:, 0].tolist(),
        "pixels_shape": list(values.shape),
        "pixels_sha256": hashlib.sha256(pixel_bytes(values, spec.image_mean, spec.image_std)).hexdigest(),
        "pixels_step": step,
        "pixels_sample": [round(float(value), 6) for value in values.reshape(-1)[::step]],
    }


def main() -> None:
    result = {"made_with": {"transformers": transformers.__version__, "torch": torch.__version__}, "cases": {}}
    for family, kind in {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor}.items():
        with tempfile.TemporaryDirectory() as folder:
            model_class = getattr(transformers, kind.__name__.replace("Processor", "ForConditionalGeneration"))
            model = model_class.from_pretrained(make_tiny(folder, family))
            tokenizer = AutoTokenizer.from_pretrained(folder)
            pil = Qwen2VLImageProcessorPil.from_pretrained(folder)
            processor = kind(pil, tokenizer, Qwen2VLVideoProcessor(), chat_template=tokenizer.chat_template)
            for name, (which, text) in CASES.items():
                case = make_case(processor, model, [picture(*SIZES[i]) for i in which], text)
                result["cases"][f"{family}: {name}"] = {"family": family, "images": which, "text": text, **case}
    (HERE / "prompts.json").write_text(json.dumps(result, ensure_ascii=False).replace('}, "qwen', '},\n"qwen') + "\n")


if __name__ == "__main__":
    main()
