"""Answers that are code: asked for as a continuation or in a chat, and right where the task's own tests hold.

Whoever has them judged runs what a model has written: in a process of its own, in an empty folder, without this one's
environment, and with limits on time, memory, files and further processes. That keeps accidents small and is no sandbox:
nothing keeps it from reading files or from the network.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache

from mtpkern.cases import Case

# What a continuation of a function's body does not go on with (arXiv 2107.03374).
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
SECONDS = 3
_INSTRUCTION = "Complete this Python function. Answer with the whole function in one code block.\n\n```python\n{}```\n"
_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
# Of a program that has come to its end: nothing else ends so, `sys.exit` in an answer included.
_ENDED = 87
_RUNNER = f"""
import os, resource, sys
source = sys.stdin.read()
for name, most in ("AS", 1 << 30), ("CPU", {SECONDS}), ("FSIZE", 1 << 20), ("NPROC", 0), ("CORE", 0):
    kind = getattr(resource, "RLIMIT_" + name)
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))
exec(compile(source, "answer", "exec"), {{"__name__": "answer"}})
os._exit({_ENDED})
"""


@dataclass(frozen=True)
class CodeCase(Case):
    """A function to be completed: its prompt is what stands before the body.

    entry   the function's name
    test    source that defines check(candidate), which raises where the function is wrong
    run     whether answers are judged, by running them

        test = "def check(f):\\n    assert f() == 1"
        CodeCase("1", {"prompt": "def one():\\n"}, entry="one", test=test, run=True).right("    return 1\\n")  # True
    """

    entry: str = ""
    test: str = ""
    run: bool = False

    def in_chat(self) -> CodeCase:
        """The same case as a message that says what is wanted."""
        content = _INSTRUCTION.format(self.fields["prompt"])
        asked = [{"role": "user", "content": content}]
        return replace(self, fields={"messages": asked, "prompt": self.fields["prompt"]})

    def right(self, text: str, rule: str = "auto") -> bool | None:
        """Whether the tests hold of an answer; None where answers are not run."""
        return passes(self.program(text)) if self.run else None

    def program(self, text: str) -> str:
        """An answer with its tests behind it: of a code block, if there is one, whose function may be a whole one."""
        prompt = self.fields["prompt"]
        fenced = _FENCED.search(text)
        code = text if fenced is None else fenced[1]
        head = re.compile(rf"^def {re.escape(self.entry)}\(", re.MULTILINE)
        if head.search(code) and (begins := head.search(prompt)):
            # Imports and helpers that the prompt brings may be relied on.
            prompt = prompt[: begins.start()]
        return f"{prompt}{code}\n{self.test}\ncheck({self.entry})\n"


# What is written alike in several ways is run once.
@lru_cache(maxsize=4096)
def passes(program: str) -> bool:
    """Whether a program comes to its end within the limits: `passes("assert 1 + 1 == 2")` is True."""
    with tempfile.TemporaryDirectory(prefix="mtpkern-code-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _RUNNER],
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        with suppress(subprocess.TimeoutExpired):
            process.communicate(program.encode("utf-8", "replace"), timeout=SECONDS + 1)
        # Where processes are not limited, as for root, an answer may have left some.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode == _ENDED


def require_limits() -> None:
    """Raises ValueError where code cannot be run within the limits, as on Windows, before any answer is."""
    if os.name != "posix" or not passes("pass"):
        raise ValueError("--run-code: this system cannot limit what a process takes; leave it out, or run it elsewhere")
