"""The embedded policy's folder: it loads like a published Qwen2.5-VL one; its tokenizer is short and loses nothing."""

import hashlib
import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pr1.data.scenes import LABELS, SceneDataset, SceneOptions
from pr1.tiny import COCO_NAMES, SPECIAL_TOKENS, main, make_tiny_policy, wanted_pieces

CATEGORY_PROMPT = "Please output bbox coordinates and names of {}."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_policy(tmp_path_factory.mktemp("tiny") / "policy")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder):
    loaded, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info  # nothing missing, unexpected or mismatched
    return loaded.float().eval()


def pieces(tokenizer, text):
    return [tokenizer.decode([i]) for i in tokenizer.encode(text)]


def answer(boxes, labels):
    return json.dumps([{"bbox_2d": b, "label": c} for b, c in zip(boxes, labels, strict=True)])


def test_an_answer_is_cut_as_meant(tokenizer):
    text = '[{"bbox_2d": [12, 34, 156, 78], "label": "red"}, {"bbox_2d": [0, 5, 299, 100], "label": "brown"}]'
    first = ["[", '{"bbox_2d": [', "12", ", 34", ", 156", ", 78", '], "label": "', "red", '"}']
    second = [', {"bbox_2d": [', "0", ", 5", ", 299", ", 100", '], "label": "', "brown", '"}', "]"]
    assert pieces(tokenizer, text) == first + second
    assert pieces(tokenizer, "[]") == ["[]"]


def test_eight_tokens_an_object(tokenizer):
    rng = np.random.default_rng(0)
    for n in (1, 3, 20):
        boxes = rng.integers(0, 300, (n, 4)).tolist()
        labels = [LABELS[i] for i in rng.integers(0, 8, n)]
        assert len(tokenizer.encode(answer(boxes, labels))) == 8 * n + 2
    for n in range(300, 1000):
        assert len(tokenizer.encode(str(n))) == len(tokenizer.encode(f", {n}")) == 2


def test_every_wanted_piece_is_one_token(tokenizer):
    """By the tokenizers library, which knows nothing of how the merges were found."""
    ids = [tokenizer.encode(piece) for piece in wanted_pieces()]
    assert all(len(i) == 1 for i in ids)
    assert len({i[0] for i in ids}) == len(ids) > 900
    assert {str(n) for n in range(300)} | {f", {n}" for n in range(300)} | set(LABELS) <= set(wanted_pieces())


def test_prompts_are_short(tokenizer):
    assert len(tokenizer.encode(CATEGORY_PROMPT.format(", ".join(LABELS)))) == 7 + 2 * 8
    words = COCO_NAMES.split()
    assert len(words) == 95  # the 80 names; fifteen are of two words
    assert len(tokenizer.encode(CATEGORY_PROMPT.format(", ".join(words)))) == 7 + 2 * 95


def test_qwens_chat_text(tokenizer):
    question = "Please output bbox coordinates and names of circle."
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    text = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        "Please output bbox coordinates and names of circle.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert len(tokenizer.encode(text)) <= 35
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " a "}, {"type": "image"}]},
        {"role": "assistant", "content": "[]"},
    ]
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{image} a {image}<|im_end|>\n"
        "<|im_start|>assistant\n[]<|im_end|>\n"
    )
    numbered = tokenizer.apply_chat_template(messages[1:2], tokenize=False, add_vision_id=True)
    assert f"user\nPicture 1: {image} a Picture 2: {image}<|im_end|>" in numbered


FRAGMENTS = [
    *SPECIAL_TOKENS,
    *wanted_pieces()[::7],
    "'s",
    "```json\n",
    "\t",
    "  ",
    "\r\n",
    "é",
    "e\u0301",
    "好",
    "🦒",
    "\x00",
]


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(st.text(max_size=80), st.lists(st.sampled_from(FRAGMENTS), max_size=20).map("".join)))
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert all(i < len(tokenizer) for i in ids)


def test_any_bytes_have_tokens(tokenizer):
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    assert len(alphabet) == 256 and alphabet <= set(tokenizer.get_vocab())


def test_special_tokens(tokenizer, folder):
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(len(tokenizer) - 14, len(tokenizer)))  # above all text, in the published order
    for token, i in zip(SPECIAL_TOKENS, ids, strict=True):
        assert tokenizer.encode(f"a{token}b")[1:-1] == [i]
        assert tokenizer.decode([i], skip_special_tokens=True) == ""
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    config = AutoConfig.from_pretrained(folder)
    named = [config.vision_start_token_id, config.vision_end_token_id, config.image_token_id, config.video_token_id]
    assert named == [ids[9], ids[10], ids[12], ids[13]]
    stop = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert stop == [ids[2], ids[0]]
    assert 1200 <= len(tokenizer) <= 1600
    assert len(tokenizer) < config.text_config.vocab_size <= len(tokenizer) + 64  # ids beyond the tokenizer exist


def test_the_cut_survives_saving(tokenizer, model, tmp_path):
    """As a checkpoint does it: model, config and tokenizer saved by transformers, read by AutoTokenizer."""
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = answer([[12, 134, 256, 278]], ["traffic light"]) + " plain text, 1234"
    assert again.encode(text) == tokenizer.encode(text)
    messages = [{"role": "user", "content": "x"}]
    assert again.apply_chat_template(messages, tokenize=False) == tokenizer.apply_chat_template(
        messages, tokenize=False
    )


def test_architecture_and_size(folder, model):
    assert isinstance(AutoModelForImageTextToText.from_pretrained(folder), Qwen2_5_VLForConditionalGeneration)
    assert 1_700_000 <= sum(p.numel() for p in model.parameters()) <= 2_300_000
    text, vision = model.config.text_config, model.config.vision_config
    assert (text.num_attention_heads, text.num_key_value_heads, text.num_hidden_layers, text.hidden_size) == (
        4,
        2,
        4,
        128,
    )
    assert text.rope_parameters["mrope_section"] == [4, 6, 6] and text.rope_parameters["rope_theta"] == 30.0
    assert (vision.depth, vision.window_size, list(vision.fullatt_block_indexes)) == (4, 112, [1, 3])
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    weights = load_file(folder / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert sum(f.stat().st_size for f in folder.iterdir()) < 8e6
    spread = model.model.language_model.layers[0].mlp.up_proj.weight.std().item()
    assert spread == pytest.approx(0.08, rel=0.02)  # transformers' init at the configured range


def test_numbers_begin_in_order(folder, model):
    """Neighbouring numbers begin with similar logits, distant ones do not; the two spellings of one are told apart."""
    names = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids
    weight = model.lm_head.weight.detach().double()

    def likeness(a, b):
        return float(torch.nn.functional.cosine_similarity(weight[names(a)], weight[names(b)], dim=0))

    for n in (20, 100, 180):
        near, far = likeness(f"{n}", f"{n + 1}"), likeness(f"{n}", f"{n + 60}")
        assert near > 0.8 and far < near - 0.3, (n, near, far)
        assert likeness(f",Ġ{n}", f",Ġ{n + 1}") > 0.8
        assert likeness(f"{n}", f",Ġ{n}") < 0.95


@pytest.fixture(scope="module")
def processor(folder):
    return Qwen2VLImageProcessorPil.from_pretrained(folder)


def test_scenes_keep_their_size(processor):
    for record in SceneDataset("val", 40, SceneOptions(min_side=112, max_side=252)):
        _, h, w = processor(images=[record.load()], return_tensors="pt")["image_grid_thw"][0].tolist()
        assert (14 * w, 14 * h) == (28 * round(record.width / 28), 28 * round(record.height / 28))


def test_it_runs_on_a_scene(tokenizer, model, processor):
    """Logits of every id, finite, and the image is seen: another scene of the same size changes them."""
    records = [r for r in SceneDataset("val", 400) if (round(r.width / 28), round(r.height / 28)) == (6, 5)][:2]
    logits = []
    for record in records:
        image = processor(images=[record.load()], return_tensors="pt")
        ids = tokenizer.encode("<|vision_start|>" + "<|image_pad|>" * 30 + "<|vision_end|>Please")
        ids = torch.tensor([ids])
        kinds = (ids == model.config.image_token_id).int()
        with torch.no_grad():
            logits.append(model(input_ids=ids, mm_token_type_ids=kinds, **image).logits)
    assert logits[0].shape == (1, 33, model.config.text_config.vocab_size)
    assert all(torch.isfinite(x).all() for x in logits)
    assert (logits[0][:, 0] - logits[1][:, 0]).abs().max() == 0
    assert (logits[0][:, -1] - logits[1][:, -1]).abs().max() > 1e-5


def hashes(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


def test_equal_seeds_equal_bytes(folder, tmp_path):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first, same = hashes(folder), hashes(make_tiny_policy(tmp_path / "same", seed=0))
    other = hashes(make_tiny_policy(str(tmp_path / "other"), seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    assert first == same
    assert {name for name in first if first[name] != other[name]} == {"model.safetensors"}
    assert set(first) == {
        "config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json",
        "tokenizer_config.json", "chat_template.json", "model.safetensors",
    }  # fmt: skip


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tiny", str(tmp_path / "new"), "--seed", "1"])
    main()
    assert "seed 1" in capsys.readouterr().out
    with pytest.raises(ValueError, match="already holds a checkpoint"):
        make_tiny_policy(tmp_path / "new")
    with pytest.raises(SystemExit):
        main()
    assert "already holds a checkpoint" in capsys.readouterr().err
