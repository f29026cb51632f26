"""Forks: two that talk, and programs that need not import everything again."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

SECONDS = 240
# What a fork is to have in its environment: where its parent had a pool of torch's threads, several threads that ask
# for one at once in the fork, as those of transformers' loader do, may find none ("Invalid thread pool!").
OF_FORKS = {"HF_DEACTIVATE_ASYNC_LOAD": "1"}


def run_in_two_processes(work: Callable[[int], None]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(2):
        if pid := os.fork():
            pids.append(pid)
            continue
        code = 1
        try:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **OF_FORKS}
            work(rank)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    deadline, codes = time.monotonic() + SECONDS, dict[int, int]()
    while len(codes) < 2 and time.monotonic() < deadline and not any(codes.values()):
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    for pid in set(pids) - set(codes):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert list(codes.values()) == [0, 0], "a process failed or took too long; its error stands above"


# One module is imported once, and each program has a fork of that: what it changes stays its own.
FORKS = """
import contextlib, importlib, json, os, sys, traceback
importlib.import_module(sys.argv[1])

for line in sys.stdin:
    code, arguments, out = json.loads(line)
    pid = os.fork()
    if not pid:
        status = 1
        try:
            with open(out, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                sys.argv = ["-c", *arguments]
                try:
                    exec(compile(code, "a program of the test", "exec"), {"__name__": "__main__"})
                    status = 0
                except BaseException:
                    traceback.print_exc()
        finally:
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@contextmanager
def forks_of(
    module: str, *, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[Callable[..., tuple[int, str]]]:
    """`run(code, *arguments)` of a process that has imported the module: how a program ends, and what it prints."""
    command = [sys.executable, "-c", FORKS, module]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            command, cwd=cwd, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as forks,
    ):
        assert forks.stdin
        assert forks.stdout
        out = Path(folder) / "printed"

        def run(code: str, *arguments: str) -> tuple[int, str]:
            print(json.dumps([code, arguments, str(out)]), file=forks.stdin, flush=True)
            status = forks.stdout.readline().strip()
            assert status, "the process that forks has ended; its error stands above"
            return int(status), out.read_text(encoding="utf-8")

        yield run
        forks.stdin.close()
