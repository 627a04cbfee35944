"""The traps of our folder names, and the direction of the imports."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHES = sorted(ROOT.glob("bench/*.py"))
# Dependencies, optional ones and their kin that may be missing here; a file of that name would replace them.
NOT_ALWAYS_INSTALLED = {
    "accelerate", "apex", "av", "cut_cross_entropy", "cv2", "datasets", "deepspeed", "einops", "evaluate", "flash_attn",
    "kernels", "lap", "liger_kernel", "matplotlib", "mpi4py", "pandas", "peft", "quack", "tensorboard", "torchvision",
    "triton", "trl", "vllm", "wandb", "xformers",
}  # fmt: skip


@pytest.fixture
def fake_kernels(tmp_path):
    """A folder where the metadata of PyPI's `kernels` lies, so that transformers takes any module of that name for it."""
    info = tmp_path / "site" / "kernels-0.18.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    return info.parent


def run_python(arguments, cwd, path):
    env = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def imports(path):
    """(level, module, names) of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from ((0, alias.name, []) for alias in node.names)


def test_our_kernels_and_the_package_of_that_name_live_side_by_side(tmp_path, fake_kernels):
    code = (
        "import importlib.metadata, importlib.util, pr1.kernels\n"
        "assert importlib.metadata.version('kernels') == '0.18.2'\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "assert spec is None or 'site-packages' in spec.origin, spec\n"
        "import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl as model\n"
        "print(pr1.kernels.__name__, model.Qwen2_5_VLForConditionalGeneration.__name__)\n"
    )
    run = run_python(["-c", code], tmp_path, fake_kernels)
    assert run.stdout.split() == ["pr1.kernels", "Qwen2_5_VLForConditionalGeneration"], run.stderr


# Runs a script up to its first import from outside the standard library and says whether its folder was off the path.
WATCH = """
import os, runpy, sys
script = sys.argv[1]
folder = os.path.dirname(script)
class Watch:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] not in sys.stdlib_module_names:
            on_path = any(os.path.realpath(entry or ".") == folder for entry in sys.path)
            print("still on the path" if on_path else "off the path")
            sys.stdout.flush()
            os._exit(0)
sys.path[0] = folder
sys.meta_path.insert(0, Watch)
sys.argv = [script]
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize("bench", BENCHES, ids=lambda path: path.name)
def test_bench_drops_its_own_folder_before_it_imports_anything(bench, tmp_path, fake_kernels):
    """Else bench/kernels.py is the module `kernels`."""
    run = run_python(["-c", WATCH, str(bench)], tmp_path, fake_kernels)
    assert run.stdout.strip() == "off the path", run.stdout + run.stderr


def test_no_file_beside_train_hides_a_library():
    """torchrun pr1/train.py puts pr1/ first on the path."""
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions()) | NOT_ALWAYS_INSTALLED
    names = {path.stem for path in ROOT.glob("pr1/*.py")} | {path.name for path in ROOT.glob("pr1/*/")}
    assert "train" in names or "matcher" in names  # we looked in the right place
    assert not names & (taken - {"pr1"})


def test_kernels_and_csrc_know_nothing_of_pr1():
    for path in ROOT.glob("kernels/**/*.py"):
        for level, module, _ in imports(path):
            # `from ..x` would be pr1.x
            assert level < 2 and module.partition(".")[0] not in ("pr1", "kernels"), f"{path.name} imports {module}"
    for path in ROOT.glob("csrc/*"):
        text = path.read_text()
        assert "module_::import" not in text, path.name
        assert not re.search(r'#include\s+"(?![a-z_]+\.h")', text), f"{path.name} includes from another folder"


def test_one_door_to_the_cpp_module_and_none_to_train():
    sources = [path for folder in ("pr1", "kernels", "bench", "tests") for path in ROOT.glob(f"{folder}/**/*.py")]
    for path in sources:
        name = path.relative_to(ROOT).as_posix()
        for level, module, names in imports(path):
            full = module if level == 0 else f"pr1.{module}".rstrip(".")
            modules = {full, *(f"{full}.{n}" for n in names)}
            assert "pr1._C" not in modules or name == "pr1/matcher.py", f"{name} imports pr1._C"
            assert "pr1.train" not in modules or name.startswith("tests/"), f"{name} imports pr1.train"


def test_every_package_is_installed():
    listed = re.search(r"packages=(\[.*?\])", (ROOT / "setup.py").read_text(), re.S)
    folders = [path.parent.relative_to(ROOT) for path in ROOT.glob("pr1/**/__init__.py")]
    assert set(ast.literal_eval(listed[1])) == {".".join(folder.parts) for folder in folders} | {"pr1.kernels"}


def test_every_dependency_is_pinned_in_the_one_file():
    lines = [line.split(";")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = project["project"]["dependencies"] + project["build-system"]["requires"]
    names = {re.match(r"[A-Za-z0-9_-]+", requirement)[0] for requirement in needed}
    assert names <= set(pins), f"not pinned: {names - set(pins)}"
