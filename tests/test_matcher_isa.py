"""The builds of csrc/: which instructions stand where, how one is chosen, threads, forks, and the sanitizers."""

import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from isas import ISAS

from pr1.matcher import Boxes, MatchCost, linear_sum_assignment_batch, match_boxes, settings

ROOT = Path(__file__).resolve().parents[1]
CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def test_the_best_instruction_set_is_the_default(monkeypatch):
    monkeypatch.delenv("PR1_ISA", raising=False)
    assert settings()[0] == ISAS[-1]
    monkeypatch.setenv("PR1_ISA", "")
    assert settings()[0] == ISAS[-1]


@pytest.mark.parametrize("variable, value, message", [
    ("PR1_ISA", "avx1024", "PR1_ISA=avx1024 is unknown; it takes avx512, avx2 or scalar"),
    ("PR1_THREADS", "0", "PR1_THREADS=0 must be a number from 1 to 1024"),
    ("PR1_THREADS", "two", "PR1_THREADS=two must be"),
])  # fmt: skip
def test_a_setting_that_cannot_be_used_is_refused(variable, value, message, monkeypatch):
    monkeypatch.setenv(variable, value)
    for call in (settings, lambda: linear_sum_assignment_batch([[[1.0]]])):
        with pytest.raises(ValueError, match=message):
            call()


def test_threads_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("PR1_THREADS", raising=False)
    assert settings()[1] == 3
    monkeypatch.setenv("PR1_THREADS", "5")
    assert settings()[1] == 5
    monkeypatch.delenv("PR1_THREADS")
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    assert settings()[1] == min(len(os.sched_getaffinity(0)), 16)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump (binutils)")
def test_vector_instructions_stand_only_where_they_are_chosen():
    """A function that uses 512 bits carries in_avx512 in its name, one of 256 bits in_avx2 or in_avx512."""
    module = sys.modules["pr1._C"].__file__
    command = ["objdump", "-d", "--no-show-raw-insn", module]
    code = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    seen = {"zmm": set(), "ymm": set()}
    function = None
    for line in code.splitlines():
        if header := re.fullmatch(r"[0-9a-f]+ <(.+)>:", line):
            function = header[1]
        for register, functions in seen.items():
            if f"%{register}" in line:
                functions.add(function)
    if os.uname().machine == "x86_64":
        assert len(seen["zmm"]) >= 10  # the module still has its symbols
        assert any("in_avx2" in name for name in seen["ymm"])
    assert all("in_avx512" in name for name in seen["zmm"]), seen["zmm"]
    assert all(re.search("in_avx(2|512)", name) for name in seen["ymm"]), seen["ymm"]


def big_batch(dtype=np.float32):
    return np.random.default_rng(0).integers(0, 30, (400, 30, 40)).astype(dtype)


def same(first, second):
    return all((a == b).all() for a, b in zip(first, second, strict=True))


def test_threads_and_callers_give_one_answer(monkeypatch):
    """Enough work for the pool; eight callers at once, one of which gets it."""
    monkeypatch.setenv("PR1_THREADS", "1")
    costs = big_batch()
    alone = linear_sum_assignment_batch(costs)
    monkeypatch.setenv("PR1_THREADS", "4")
    answers = []
    callers = [threading.Thread(target=lambda: answers.append(linear_sum_assignment_batch(costs))) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(answers) == 8 and all(same(answer, alone) for answer in answers)
    assert len(os.listdir("/proc/self/task")) >= 4  # the pool was there


def test_the_first_bad_problem_is_named_whatever_the_threads(monkeypatch):
    monkeypatch.setenv("PR1_THREADS", "4")
    costs = big_batch(np.float64)
    costs[[399, 130, 257], 3, 5] = np.nan
    for _ in range(20):
        with pytest.raises(ValueError, match=r"problem 130: cost\[3, 5\] is NaN"):
            linear_sum_assignment_batch(costs)


def test_a_forked_process_has_threads_of_its_own(monkeypatch):
    monkeypatch.setenv("PR1_THREADS", "3")
    costs = big_batch()
    expected = linear_sum_assignment_batch(costs)
    child = os.fork()
    if child == 0:  # no assert here: the child must not run pytest's own clean-up
        ok = False
        try:
            ok = same(linear_sum_assignment_batch(costs), expected) and len(os.listdir("/proc/self/task")) >= 3
        finally:
            os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert same(linear_sum_assignment_batch(costs), expected)


def test_match_boxes_is_the_same_on_threads(monkeypatch):
    rng = np.random.default_rng(1)
    corner = rng.integers(0, 20, (6000, 2))
    boxes = np.concatenate([corner, corner + rng.integers(1, 9, (6000, 2))], 1).astype(np.float64)
    packed = Boxes(boxes, rng.integers(0, 2, 6000), np.arange(0, 6001, 30), rng.random(6000) < 0.1)
    results = []
    for threads in ("1", "4"):
        monkeypatch.setenv("PR1_THREADS", threads)
        for cost in (MatchCost(), MatchCost(forbid_other_class=True, min_iou=0.3)):
            results.append(match_boxes(packed, packed, np.full((200, 2), 30), cost))
    for one, other in zip(results[:2], results[2:], strict=True):
        assert same(vars(one).values(), vars(other).values())
    assert len(results[0].rows) > 1000 and results[0].ignored.any()


@pytest.mark.skipif(CMAKE is None, reason="needs cmake beside python or on the path")
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(sanitizers, tmp_path):
    compiler = os.environ.get("CXX", "c++")
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    works = [
        [compiler, f"-fsanitize={sanitizers}", str(probe), "-o", str(tmp_path / "probe")],
        [str(tmp_path / "probe")],
    ]
    if any(subprocess.run(command, capture_output=True).returncode for command in works):
        pytest.skip(f"{compiler} lacks -fsanitize={sanitizers} here")
    configure = [CMAKE, "-S", str(ROOT), "-B", str(tmp_path), f"-DSANITIZE={sanitizers}"]
    subprocess.run(configure, check=True, capture_output=True, timeout=120)
    subprocess.run([CMAKE, "--build", str(tmp_path)], check=True, capture_output=True, timeout=600)
    run = subprocess.run([str(tmp_path / "selftest")], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count(" ok") == len(ISAS)
