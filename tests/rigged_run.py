"""Runs a program of the package with the rigged reward of tests/runs.py.

    python tests/rigged_run.py [--flat ID,ID] [--dump FILE] [--events FILE] [--kill N] {train,sft,eval} FLAGS...
    python tests/rigged_run.py --serve      forks one such process for each request on standard input

--events FILE writes the name of every call that changes the disk, one a line; --kill N is `kill -9` in the middle of
the Nth of them: half of a write done, a folder half deleted, before a rename or a push to the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from runs import RiggedDet, Spy

import pr1.eval
import pr1.session
import pr1.sft
import pr1.train
from pr1.tasks import TASKS

PROGRAMS = {"train": pr1.train.main, "sft": pr1.sft.main, "eval": pr1.eval.main}


def half_write(descriptor, data):
    os_write(descriptor, data[: len(data) // 2])


def half_rmtree(path, *_, **__):
    for file in sorted(Path(path).iterdir())[::2]:
        file.unlink()


def half_save(_, path, *__, **___):
    Path(path).write_bytes(b"PK\x03\x04 half a file")


def nothing(*_, **__):
    pass


os_write = os.write
# name -> (module, attribute, what is done of it before the process dies)
CALLS = {
    "write": (os, "write", half_write),
    "fsync": (os, "fsync", nothing),
    "rename": (os, "rename", nothing),
    "replace": (os, "replace", nothing),
    "rmtree": (shutil, "rmtree", half_rmtree),
    "save": (torch, "save", half_save),
}


class Events:
    """Counts calls that change the disk, and dies in one of them."""

    def __init__(self, file: str | None, kill: int | None):
        self.file, self.kill, self.count = file and open(file, "w"), kill, 0
        for name, (module, attribute, half) in CALLS.items():
            setattr(module, attribute, self.wrap(name, getattr(module, attribute), half))

    def wrap(self, name, call, half):
        def counted(*args, **kwargs):
            self.count += 1
            if self.file:
                print(name, file=self.file, flush=True)
            if self.count == self.kill:
                half(*args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counted


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--flat", default="")
    parser.add_argument("--dump")
    parser.add_argument("--events")
    parser.add_argument("--kill", type=int)
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("flags", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)
    pr1.session.lint_before_training = lambda *_: None  # the rigged reward ranks nothing rightly
    TASKS["det"] = RiggedDet(flat=tuple(options.flat.split(",")))
    spy = Spy(setattr) if options.dump else None
    if options.events or options.kill:
        Events(options.events, options.kill)
    status = PROGRAMS[options.program](options.flags)
    if spy:
        torch.save(spy.plain(), f"{options.dump}.{os.environ.get('RANK', 0)}.pt")
    return status


def fork(process: dict) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.environ.update(process["env"])
        log = os.open(process["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor, target in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
            os.dup2(descriptor, target)
        status = main(process["argv"])
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(pid: int, deadline: float) -> int | None:
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.01)


def serve() -> None:
    ended: dict[int, int] = {}  # what a child ended with; a child can be waited for once only
    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "start":
            reply = [fork(process) for process in request["processes"]]
            running.update(reply)
        else:
            deadline = time.monotonic() + request["timeout"]
            for pid in request["pids"]:
                if pid in running and (status := wait(pid, deadline)) is not None:
                    ended[pid] = status
                    running.discard(pid)
            reply = [ended.get(pid) for pid in request["pids"]]
        print(json.dumps(reply), flush=True)
    for pid in running:  # of a test that failed
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        sys.exit(main(sys.argv[1:]))
