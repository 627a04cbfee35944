"""Model families: prompts, pixels, positions, frames and the vision call, against transformers' own code."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import make_tiny, messages, picture
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from pr1.families import FAMILIES, load_family
from pr1.records import ImageInput, Sample

GOLDEN = json.loads((Path(__file__).parent / "golden" / "prompts.json").read_text(encoding="utf-8"))["cases"]
SIZES = ((168, 140), (252, 364), (97, 311))
NAMES = sorted(FAMILIES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: make_tiny(tmp_path_factory.mktemp(name), name, tied=name == "qwen2_vl", seed=3) for name in NAMES}


@pytest.fixture(scope="module")
def families(folders):
    return {name: load_family(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def models(families):
    return {name: family.load_model(torch.float64).eval() for name, family in families.items()}


def make_sample(family, images, text="Output the bounding box of the cat in the image.") -> Sample:
    frames = tuple(family.frame(*image.size) for image in images)
    return Sample("s1", "det", messages(len(images), text), tuple(images), frames, None)


def same_as_processor(family, case) -> None:
    """Assert that our encoding of a golden case is transformers' encoding of it."""
    sample = make_sample(family, [picture(*SIZES[i]) for i in case["images"]], case["text"])
    prompt = family.encode(sample)
    assert prompt.ids.tolist() == case["ids"]
    assert [list(image.grid) for image in prompt.images] == case["grids"]
    assert prompt.position_ids.tolist() == case["positions"]
    assert prompt.next_position == max(map(max, case["positions"])) + 1
    assert family.prompt_length(sample.messages, sample.frames) == len(case["ids"])
    pixels = torch.cat([image.pixels for image in prompt.images]).numpy()
    assert list(pixels.shape) == case["pixels_shape"] and pixels.dtype == np.float32
    np.testing.assert_allclose(pixels.reshape(-1)[:: case["pixels_step"]], case["pixels_sample"], atol=2e-6)
    values = pixels.astype(np.float64).reshape(len(pixels), 3, -1)
    eight = (values * np.array(family.spec.std)[:, None] + np.array(family.spec.mean)[:, None]) * 255
    assert np.abs(eight - np.rint(eight)).max() < 1e-3
    assert hashlib.sha256(np.rint(eight).astype(np.uint8).tobytes()).hexdigest() == case["pixels_sha256"]


@pytest.mark.parametrize("case", sorted(GOLDEN))
def test_prompts_equal_those_of_transformers_processors(families, case):
    same_as_processor(families[GOLDEN[case]["family"]], GOLDEN[case])


@pytest.mark.parametrize("name", NAMES)
def test_pixels_equal_the_pil_image_processor_bit_by_bit(families, name):
    family, rng = families[name], np.random.default_rng(0)
    processor = Qwen2VLImageProcessorPil.from_pretrained(family.folder)
    for width, height in [(200, 200), (30, 20), (97, 311), (28, 28), (640, 427), (5, 900)]:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        theirs, ours = (
            processor(images=[image], return_tensors="pt"),
            family.image_input(image, family.frame(width, height)),
        )
        assert ours.grid == tuple(theirs["image_grid_thw"][0].tolist())
        assert torch.equal(ours.pixels, theirs["pixel_values"])


def test_image_keys_name_content_and_size(families):
    family, image = families["qwen2_5_vl"], picture(168, 140)
    key = family.image_input(image, family.frame(168, 140)).key
    assert key == family.image_input(image.copy(), family.frame(168, 140)).key
    other = image.copy()
    other.putpixel((50, 50), (255, 255, 255))
    blank = [Image.new("RGB", size) for size in ((168, 140), (140, 168))]
    keys = [family.image_input(each, family.frame(*each.size)).key for each in (other, *blank)]
    assert len({key, *keys}) == 4


# ---- positions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_positions_of_a_small_prompt_worked_by_hand(families, name):
    """Three text tokens, an image of 3 rows and 2 columns of tokens, two text tokens."""
    pad = families[name].image_token_id
    ids = torch.tensor([5, 6, 7, pad, pad, pad, pad, pad, pad, 8, 9])
    assert families[name].positions(ids, [(1, 6, 4)]).tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7],
        [0, 1, 2, 3, 3, 4, 4, 5, 5, 6, 7],
        [0, 1, 2, 3, 4, 3, 4, 3, 4, 6, 7],
    ]


@pytest.mark.parametrize("name", NAMES)
def test_positions_equal_get_rope_index_on_random_prompts(families, models, name):
    family, rng = families[name], np.random.default_rng(1)
    for _ in range(40):
        ids, grids = [], []
        for _ in range(rng.integers(1, 5)):
            height, width = rng.integers(1, 9, 2)
            ids += [5] * rng.integers(1, 12) + [family.image_token_id] * (height * width)
            grids.append((1, 2 * int(height), 2 * int(width)))
        ids = torch.tensor(ids + [6] * rng.integers(0, 7))
        kinds = (ids == family.image_token_id).long()
        theirs, _ = models[name].model.get_rope_index(ids[None], kinds[None], image_grid_thw=torch.tensor(grids))
        ours = family.positions(ids, grids)
        assert ours.dtype == torch.int64 and torch.equal(ours, theirs[:, 0])


def test_positions_refuse_grids_that_do_not_fit(families):
    family = families["qwen2_vl"]
    pad = family.image_token_id
    for ids, grids in (([5, pad], [(1, 4, 4)]), ([5, pad, pad, pad, 5, pad], [(1, 4, 4)]), ([5, pad], [])):
        with pytest.raises(ValueError, match="image token"):
            family.positions(ids, grids)
    assert family.positions([5, 6, 7], []).tolist() == [[0, 1, 2]] * 3


# ---- the model -------------------------------------------------------------------------------------------------------


def plain_logits(family, model, prompt) -> torch.Tensor:
    """(L, V): the unmodified transformers forward."""
    return model(
        input_ids=prompt.ids[None],
        attention_mask=torch.ones_like(prompt.ids)[None],
        pixel_values=torch.cat([image.pixels for image in prompt.images]).double(),
        image_grid_thw=torch.tensor([image.grid for image in prompt.images]),
        mm_token_type_ids=(prompt.ids == family.image_token_id).long()[None],
    ).logits[0]


def our_logits(family, model, prompt, features) -> torch.Tensor:
    embeds = family.embed(model, prompt.ids, features)
    hidden = family.language_model(model)(
        inputs_embeds=embeds[None], position_ids=prompt.position_ids[:, None], use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden)[0]


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_features_and_embeddings_give_the_plain_models_logits(families, models, name):
    family, model = families[name], models[name]
    prompt = family.encode(make_sample(family, [picture(168, 140), picture(97, 311)]))
    features = family.image_features(model, prompt.images)
    for image, (ours,) in zip(prompt.images, features, strict=True):
        theirs = model.get_image_features(image.pixels.double(), torch.tensor([image.grid])).pooler_output[0]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    plain = plain_logits(family, model, prompt)
    torch.testing.assert_close(our_logits(family, model, prompt, features), plain, rtol=0, atol=1e-10)

    # The weights see what the test is about: each of these moves a log-prob by more than 0.1 nat.
    def moved(other) -> float:
        return float((other[-1].log_softmax(-1) - plain[-1].log_softmax(-1)).abs().max())

    flipped = family.image_input(picture(168, 140).rotate(180), family.frame(168, 140))
    flipped = family.image_features(model, [flipped])
    assert moved(our_logits(family, model, prompt, [*flipped, features[1]])) > 0.1
    line = replace(prompt, position_ids=torch.arange(len(prompt.ids)).expand(3, -1))
    assert moved(our_logits(family, model, line, features)) > 0.1
    swapped = replace(prompt, position_ids=prompt.position_ids[[0, 2, 1]])
    assert moved(our_logits(family, model, swapped, features)) > 0.1
    token = replace(prompt, ids=prompt.ids.clone())
    token.ids[-4] += 1
    assert moved(our_logits(family, model, token, features)) > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_embed_is_differentiable_in_features_and_embeddings(families, models, name):
    family, model = families[name], models[name]
    pad, table = family.image_token_id, models[name].model.language_model.embed_tokens.weight
    ids, features = (
        torch.tensor([7, pad, pad, 7]),
        torch.randn(2, table.shape[1], dtype=torch.float64, requires_grad=True),
    )
    out = family.embed(model, ids, [(features,)])
    weight = torch.arange(4, dtype=torch.float64)[:, None].expand_as(out)
    grads = torch.autograd.grad((out * weight).sum(), [features, table])
    assert torch.equal(grads[0], weight[1:3]) and torch.equal(grads[1][7], weight[0] + weight[3])
    assert not grads[1][pad].any()
    with pytest.raises(ValueError, match="2 image tokens in the stream but 1 rows"):
        family.embed(model, ids, [(features[:1],)])
    assert torch.equal(family.embed(model, ids[[0, 3]], []), table[[7, 7]])
    assert family.image_features(model, []) == []


@pytest.mark.parametrize("name", NAMES)
def test_banned_ids(families, models, name):
    family, size = families[name], models[name].config.text_config.vocab_size
    banned = family.banned_ids(size)
    names = {
        family.tokenizer.convert_ids_to_tokens(i) for i in banned.nonzero()[:, 0].tolist() if i < len(family.tokenizer)
    }
    assert names == {"<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"}
    assert size > len(family.tokenizer) and banned[len(family.tokenizer) :].all() and banned.shape == (size,)
    assert family.stop_ids == tuple(family.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))


# ---- frames ----------------------------------------------------------------------------------------------------------


@given(st.integers(20, 3000), st.integers(20, 3000), st.integers(56 * 56, 1_000_000), st.sampled_from(NAMES), st.data())
@settings(max_examples=200, deadline=None)
def test_frames_round_trip_within_half_a_text_unit(families, width, height, max_pixels, name, data):
    family = families[name]
    limited = object.__new__(type(family))
    limited.spec = replace(family.spec, max_pixels=max_pixels)
    frame = limited.frame(width, height)
    theirs = smart_resize(height, width, 28, family.spec.min_pixels, max_pixels)
    assert (frame.model_height, frame.model_width) == theirs and frame.family == name
    xs = sorted(data.draw(st.lists(st.floats(0, width), min_size=2, max_size=2)))
    ys = sorted(data.draw(st.lists(st.floats(0, height), min_size=2, max_size=2)))
    box = np.array([xs[0], ys[0], xs[1], ys[1]])
    assert np.abs(frame.to_original(frame.scale_to_text(box)) - box).max() < 1e-4
    answer = family.parse_boxes(family.format_boxes([("cat", frame.to_text(box).tolist())]))
    back = frame.to_original(answer.items[0].box)
    units = (theirs[1], theirs[0]) if name == "qwen2_5_vl" else (1000, 1000)
    half = np.array([0.5 * width / units[0], 0.5 * height / units[1]] * 2)
    assert (np.abs(back - box) <= half + 1e-9).all()


def test_frames_of_known_images(families):
    """A box over the right half of a 97x311 image, which the model sees as 84x308."""
    for name, expected in {"qwen2_5_vl": [42, 0, 84, 308], "qwen2_vl": [500, 0, 1000, 1000]}.items():
        frame = families[name].frame(97, 311)
        assert (frame.width, frame.height, frame.model_width, frame.model_height) == (97, 311, 84, 308)
        assert frame.to_text([48.5, 0, 97, 311]).tolist() == expected
        assert frame.to_original(expected) == pytest.approx([48.5, 0, 97, 311])


@pytest.mark.parametrize("size", [(0, 10), (10, 2010)])
def test_impossible_image_sizes_are_refused(families, size):
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}"):
        families["qwen2_vl"].frame(*size)


# ---- loading and refusing --------------------------------------------------------------------------------------------


def test_load_family_names_the_folder_and_what_is_supported(folders, tmp_path):
    with pytest.raises(ValueError, match="absent: no such folder.*Qwen2.5-VL"):
        load_family(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="no config.json.*Qwen2-VL"):
        load_family(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=f"{tmp_path}.*'llama'.*Qwen2.5-VL"):
        load_family(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not readable as JSON"):
        load_family(str(tmp_path))
    with pytest.raises(ValueError, match="--max-pixels"):
        load_family(folders["qwen2_vl"], max_pixels=1000)


@pytest.mark.parametrize("name", NAMES)
def test_pixel_limits_win_over_the_folder_and_survive_saving(folders, tmp_path, name):
    family = load_family(folders[name], max_pixels=20 * 784, min_pixels=15 * 784)
    assert type(family) is FAMILIES[name]
    large, small = family.frame(500, 300), family.frame(60, 60)
    size = {"shortest_edge": 15 * 784, "longest_edge": 20 * 784}
    processor = Qwen2VLImageProcessorPil.from_pretrained(folders[name], size=size, min_pixels=None, max_pixels=None)
    for frame, image in ((large, picture(500, 300)), (small, picture(60, 60))):
        theirs = processor(images=[image], return_tensors="pt")
        assert torch.equal(family.image_input(image, frame).pixels, theirs["pixel_values"])
    shutil.copy(Path(folders[name]) / "config.json", tmp_path)
    family.save_pretrained(str(tmp_path))
    again = load_family(str(tmp_path))
    assert (
        again.spec == family.spec
        and Qwen2VLImageProcessorPil.from_pretrained(tmp_path).size["longest_edge"] == 20 * 784
    )
    sample = make_sample(family, [picture(500, 300)])
    assert torch.equal(again.encode(sample).ids, family.encode(sample).ids)


def turn(role, *content):
    return {"role": role, "content": list(content)}


IMAGE, TEXT, VIDEO = {"type": "image"}, {"type": "text", "text": "Where?"}, {"type": "video"}


@pytest.mark.parametrize(
    "conversation, images, complaint",
    [
        ([turn("user", VIDEO, TEXT)], 0, "sample s7: video"),
        (
            [turn("user", IMAGE, TEXT), turn("assistant", IMAGE), turn("user", TEXT)],
            2,
            "sample s7: an image in an assistant",
        ),
        ([turn("user", TEXT)], 1, "sample s7: .* 0 image placeholders .* 1 images"),
        ([turn("user", IMAGE, TEXT)], 0, "sample s7: .* 1 image placeholders .* 0 images"),
        ([turn("user", IMAGE, {"type": "text", "text": "<|image_pad|>"})], 1, "sample s7: .* 2 image placeholders"),
        ([turn("user", {"type": "text", "text": "<|video_pad|>"})], 0, "sample s7: .*video"),
        ([turn("user", {"type": "audio"})], 0, "sample s7: content of type 'audio'"),
        ([], 0, "sample s7: no messages"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_encode_refuses_by_name(families, name, conversation, images, complaint):
    family = families[name]
    frames = (family.frame(168, 140),) * images
    with pytest.raises(ValueError, match=complaint):
        family.encode(Sample("s7", "det", conversation, (picture(168, 140),) * images, frames, None))
    with pytest.raises(ValueError):
        family.prompt_length(conversation, frames)


def test_encode_refuses_a_frame_of_another_image_or_family(families):
    family, sample = families["qwen2_vl"], make_sample(families["qwen2_vl"], [picture(168, 140)])
    for frame in (
        family.frame(140, 168),
        families["qwen2_5_vl"].frame(168, 140),
        replace(sample.frames[0], model_width=140),
    ):
        with pytest.raises(ValueError, match="sample s1: image 0 is 168x140"):
            family.encode(replace(sample, frames=(frame,)))
    with pytest.raises(ValueError, match="1 images but 0 frames"):
        family.encode(replace(sample, frames=()))


@pytest.mark.parametrize("name", NAMES)
def test_text_only_prompts(families, name):
    family = families[name]
    prompt = family.encode(make_sample(family, [], "Hello"))
    expected = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    assert family.tokenizer.decode(prompt.ids) == expected + "<|im_start|>assistant\n"
    assert prompt.images == () and prompt.position_ids.tolist() == [list(range(len(prompt.ids)))] * 3


# ---- completions as text ---------------------------------------------------------------------------------------------


def reference_spans(family, ids) -> list[tuple[int, int]]:
    """From the byte lengths of the vocabulary's entries and the character boundaries of the valid text."""
    owner = [i for i, char in enumerate(family.decode(ids)) for _ in char.encode()]
    spans, at = [], 0
    for token in ids:
        size = 0 if token in family.stop_ids else len(family.tokenizer.convert_ids_to_tokens(token))
        spans.append((owner[at], owner[at + size - 1] + 1) if size else (len(family.decode(ids)),) * 2)
        at += size
    return spans


@given(st.text(st.sampled_from('ab {}[]0cat:",é漢字🙂\n'), min_size=0, max_size=30), st.sampled_from(NAMES))
@settings(max_examples=100, deadline=None)
def test_decode_and_token_spans(families, text, name):
    family = families[name]
    ids = family.tokenizer(text)["input_ids"]
    assert (
        family.decode(ids) == text and family.decode(torch.tensor([*ids, family.stop_ids[0]], dtype=torch.long)) == text
    )
    ids = [*ids, family.stop_ids[0]]
    assert family.token_spans(ids) == reference_spans(family, ids)


@given(st.lists(st.integers(0, 413), max_size=25))
@settings(max_examples=150, deadline=None)
def test_decode_of_any_ids_is_the_tokenizers(families, ids):
    family = families["qwen2_vl"]
    kept = [i for i in ids if i not in family.stop_ids]
    text = family.decode(ids)
    assert text == family.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    spans = family.token_spans(ids)
    assert len(spans) == len(ids)
    covered = [index for start, end in spans for index in range(start, end)]
    assert sorted(set(covered)) == list(range(len(text)))
    assert covered == sorted(covered)


def test_box_tokens_stay_in_the_text(families):
    for family in families.values():
        text = "<|object_ref_start|>cat<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>"
        ids = family.tokenizer(text + "<|im_end|>")["input_ids"]
        assert family.decode(ids) == text
        assert (
            family.token_spans(ids)[0] == (0, len("<|object_ref_start|>"))
            and family.token_spans(ids)[-1] == (len(text),) * 2
        )
        assert family.decode([len(family.tokenizer) + 3]) == "" and family.decode([]) == ""


def test_image_input_is_what_the_record_says(families):
    image = families["qwen2_vl"].image_input(picture(168, 140).convert("RGBA"), families["qwen2_vl"].frame(168, 140))
    assert isinstance(image, ImageInput) and image.pixels.shape == (120, 1176) and image.grid == (1, 10, 12)
