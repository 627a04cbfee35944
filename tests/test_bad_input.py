"""Bad input ends before any long work in status 2 and one message that names what is wrong and what to do.

Where nothing has started no run folder is left behind.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import runs
from PIL import Image
from runs import SHORT, one_image_data
from tiny_models import make_tiny

import pr1.sft
import pr1.train
from pr1.runfolder import open_run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("bad") / "model", "qwen2_5_vl", hidden=32)


@pytest.fixture
def refused(model, tmp_path, capsys, monkeypatch):
    """Runs train.py, which must refuse with all these words in its one message; no run folder may be left."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)

    def run(*flags, says, model=model, folder_is_left=False, program=pr1.train.main):
        run_dir = tmp_path / "run"
        argv = [*SHORT, "--steps", "1", "--run-dir", run_dir, "--model", model, *flags]
        assert program([str(a) for a in argv if a is not None]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("error: ") == 1 and "Traceback" not in error
        for word in says:
            assert str(word) in error, error
        assert run_dir.exists() == folder_is_left and not Path("runs").exists()
        return error

    return run


def write(tmp_path, data) -> Path:
    file = tmp_path / "instances.json"
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    return file


# ---- data ----------------------------------------------------------------------------------------------------------


def test_missing_annotations(refused, tmp_path):
    refused("--data", "none.json", "--images", tmp_path, says=["none.json", "no such annotation file", "--data"])


def test_data_without_images(refused, tmp_path):
    refused("--data", write(tmp_path, one_image_data(tmp_path)), says=["instances.json", "--images"])


def test_missing_held_out_annotations(refused, tmp_path):
    good = write(tmp_path, one_image_data(tmp_path))
    refused("--data", good, "--images", tmp_path / "images", "--eval-data", "val.json", says=["val.json"])


@pytest.mark.parametrize("content, says", [
    ('{"images": [', ["not JSON", "downloaded whole"]),
    ('[{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}]', ["not COCO instances", "--predictions"]),
    ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}', ["no images"]),
    ('{"annotations": [{"caption": "a cat"}]}', ["not COCO instances", "images"]),
])  # fmt: skip
def test_files_that_are_no_instances(content, says, refused, tmp_path):
    (tmp_path / "images").mkdir()
    refused("--data", write(tmp_path, content), "--images", tmp_path / "images", says=["instances.json", *says])


def change(data, what, **fields):
    data[what][0].update(fields)
    return data


@pytest.mark.parametrize("what, fields, says", [
    ("annotations", {"category_id": 9}, ["annotation 5", "a.png", "category_id 9", "categories"]),
    ("annotations", {"image_id": 8}, ["annotation 5", "image id 8"]),
    ("annotations", {"bbox": [1, 2, 3]}, ["annotation 5", "[1, 2, 3]", "[x, y, width, height]"]),
    ("annotations", {"bbox": [1, 2, 3, None]}, ["annotation 5", "4 finite numbers"]),
    ("images", {"width": 41}, ["a.png", "40x30", "41x30", "--images"]),
    ("images", {"height": 0}, ["image 1", "a.png", "width and height"]),
    ("images", {"file_name": "b.png"}, ["1 of 1", "missing", "b.png", "--images"]),
    ("categories", {"name": " "}, ["category 2", "empty"]),
])  # fmt: skip
def test_bad_records(what, fields, says, refused, tmp_path):
    data = change(one_image_data(tmp_path), what, **fields)
    refused("--data", write(tmp_path, data), "--images", tmp_path / "images", says=says)


def test_no_image_folder(refused, tmp_path):
    data = write(tmp_path, one_image_data(tmp_path))
    refused("--data", data, "--images", "nowhere", says=["nowhere", "no such folder of images", "--images"])


@pytest.mark.parametrize("broken", ["cut", "text", "empty"])
def test_broken_images(broken, refused, tmp_path):
    data = write(tmp_path, one_image_data(tmp_path))
    file = tmp_path / "images" / "a.png"
    Image.effect_noise((40, 30), 90).convert("RGB").save(file)
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[: len(whole) // 2], "text": b"<html>404</html>", "empty": b""}[broken])
    refused("--data", data, "--images", tmp_path / "images", says=["a.png", "1 of 1", "replace the file"])


def test_sft_checks_alike(refused, tmp_path):
    data = write(tmp_path, change(one_image_data(tmp_path), "annotations", category_id=9))
    refused("--data", data, "--images", tmp_path / "images", says=["category_id 9"], program=pr1.sft.main)


def test_dropped_boxes_are_counted_and_told(model, tmp_path, capsys, monkeypatch):
    """Boxes without area or outside do not stop a run; the log has their numbers, and the targets have no such box."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    boxes = [[1, 2, 10, 12], [5, 5, 0, 9], [5, 5, 9, 0], [60, 4, 5, 5], [30, 20, 20, 20], [2, 2, 6, 6], [9, 9, 5, 5]]
    boxes += [[3, 3, 7, 7], [8, 2, 4, 4]]
    rows = [{"id": i, "image_id": 1, "category_id": 2, "bbox": box} for i, box in enumerate(boxes)]
    data = write(tmp_path, one_image_data(tmp_path, annotations=rows))
    argv = [*SHORT, "--steps", 0, "--model", model, "--run-dir", tmp_path / "run", "--data", data, "--images",
            tmp_path / "images"]  # fmt: skip
    assert pr1.train.main([str(a) for a in argv]) == 0
    out = capsys.readouterr().out
    assert "1 images (0 without objects), 6 boxes" in out
    assert "dropped 2 boxes without area and 1 outside their image, clipped 1" in out and "WARNING" not in out


# ---- model ---------------------------------------------------------------------------------------------------------


def test_missing_model_folder(refused, tmp_path):
    refused(model=tmp_path / "no-model", says=["no-model", "no such folder", "Qwen2.5-VL"])


def test_folder_without_a_model(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(model=tmp_path / "empty", says=["empty", "config.json"])


def test_model_of_another_family(refused, tmp_path):
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    refused(model=tmp_path / "llama", says=["llama", "'llama'", "Qwen2-VL"])


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_model_without_usable_weights(damage, refused, tmp_path):
    folder = Path(make_tiny(tmp_path / "model", "qwen2_5_vl", hidden=32))
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    if damage == "cut":
        weights.write_bytes(content[: len(content) // 2])
    refused(model=folder, says=[folder, "weights"])


# ---- flags ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, says", [
    (["--group-size", "1"], ["--group-size is 1", "at least 2"]),
    (["--max-prompt-tokens", "20"], ["scene ", "--max-prompt-tokens is 20", "--max-pixels"]),
    (["--images", "x"], ["--images", "--data"]),
    (["--eval-data", "x"], ["--eval-data", "--data"]),
    (["--task", "detection"], ["--task is 'detection'", "det"]),
    (["--wandb"], ["pip install wandb"]),
])  # fmt: skip
def test_flags(flags, says, refused):
    if "--wandb" in flags:
        try:
            import wandb  # noqa: F401

            pytest.skip("wandb is installed")
        except ImportError:
            pass
    refused(*flags, says=says)


def test_a_prompt_too_long_names_the_record(refused, tmp_path):
    data = one_image_data(tmp_path)
    Image.new("RGB", (400, 300)).save(tmp_path / "images" / "big.png")
    data["images"].append({"id": 2, "file_name": "big.png", "width": 400, "height": 300})
    refused("--data", write(tmp_path, data), "--images", tmp_path / "images", "--max-prompt-tokens", 120,
            says=["big.png", "--max-prompt-tokens is 120", "--max-pixels"])  # fmt: skip


def test_misspelt_flag(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        pr1.train.main([*SHORT, "--run-dir", str(tmp_path / "run"), "--max-new-token", "5"])
    assert stop.value.code == 2 and "--max-new-token" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---- run folders ---------------------------------------------------------------------------------------------------


def test_run_folder_in_use(refused, tmp_path):
    """By this living process, another open file description; the message names it."""
    with open_run(str(tmp_path / "run"), {}, task="det", resume=False, rank=0, tensorboard=False):
        before = (tmp_path / "run" / "config.json").read_bytes()
        for flags in ([], ["--resume"]):
            refused(*flags, says=["run folder in use", f"process {os.getpid()}", "--run-dir"], folder_is_left=True)
        assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_run_folder_that_holds_a_run(refused, tmp_path):
    open_run(str(tmp_path / "run"), {}, task="det", resume=False, rank=0, tensorboard=False).close()
    refused(says=["already holds a run", "--resume", "--run-dir"], folder_is_left=True)


def test_resume_without_a_run(refused):
    refused("--resume", says=["--resume", "holds no run"])


def test_run_dir_is_a_file(refused, tmp_path):
    (tmp_path / "run").write_text("x")
    refused(says=["run", "is a file", "--run-dir"], folder_is_left=True)


def test_resume_with_other_flags_lists_them(refused, model, tmp_path, capsys):
    argv = [*SHORT, "--steps", "0", "--model", model, "--run-dir", str(tmp_path / "run")]
    assert pr1.train.main(argv) == 0
    capsys.readouterr()
    refused("--resume", "--group-size", 4, "--lr", 0.5, says=["group_size: was 3, now 4", "lr: was 0.0002, now 0.5"],
            folder_is_left=True)  # fmt: skip


def test_resume_from_a_damaged_checkpoint(refused, model, tmp_path, capsys):
    argv = [*SHORT, "--steps", "1", "--model", model, "--run-dir", str(tmp_path / "run")]
    assert pr1.train.main(argv) == 0
    capsys.readouterr()
    state = tmp_path / "run" / "checkpoints" / "step-1" / "trainer_state.pt"
    state.write_bytes(state.read_bytes()[:-200])
    refused("--resume", says=["trainer_state.pt", "delete the checkpoint"], folder_is_left=True)


# ---- a real process ------------------------------------------------------------------------------------------------


def test_as_the_user_sees_it(tmp_path):
    """`python pr1/train.py`, as torchrun starts it: status 2, one line, nothing else, no folder."""
    argv = [sys.executable, str(ROOT / "pr1" / "train.py"), "--task", "det", "--data", "none.json", "--images", "."]
    argv += ["--model", make_tiny(tmp_path / "model", "qwen2_5_vl", hidden=32)]
    done = subprocess.run(argv, cwd=tmp_path, env=runs.environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: none.json: ") and len(done.stderr.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
