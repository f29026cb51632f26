"""Ctrl-C at any moment: nothing of the run is left in the model, the thread or torch, and the next run is as ever."""

import sys
from collections import Counter
from collections.abc import Callable
from inspect import CO_GENERATOR
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch

import mtpkern
from mtpkern import recorder, routing
from mtpkern.adapter import gate_of
from mtpkern.attention import _turns
from support.packing import generate
from support.trained import trainer

pytestmark = pytest.mark.usefixtures("recorded_at_once")

# Where runs open and close what others see: contexts, and what they end with, of ours and, called by these, of Python's
# and torch's. What torch's own contexts leave open by themselves is torch's.
FILES = ("siblings.py", "routing.py", "gate.py", "recorder.py", "attention.py", "layers.py")
FILES += ("contextlib.py", "_python_dispatch.py")
ENDS = {"_strip", "unhook", "undo", "_close", "record", "end", "__enter__", "__exit__"}

Place = tuple[str, str, str]


def calls_of(run: Callable[[], Any], at: tuple[Place, int] | None = None) -> Counter[Place]:
    """How often a run enters functions of FILES, and from where, and comes back from others in these; it is interrupted
    at one of these places the nth time. Python looks for signals there.
    """
    seen: Counter[Place] = Counter()

    def look(frame: FrameType, event: str, what: Any) -> None:
        code, back = frame.f_code, frame.f_back
        if event not in ("call", "c_return") or not code.co_filename.endswith(FILES) or back is None:
            return
        is_context = code.co_flags & CO_GENERATOR and code.co_name != "<genexpr>"
        modules = [x.f_globals.get("__name__", "") for x in (frame, back)]
        if not any(x.startswith("mtpkern") for x in modules) or not (is_context or code.co_name in ENDS):
            return
        if event == "c_return" and what.__name__ == "acquire":
            return  # of a call that does not wait, which has no other way
        place = (code.co_filename, code.co_name, back.f_code.co_name if event == "call" else what.__qualname__)
        seen[place] += 1
        if at is not None and place == at[0] and seen[place] == at[1]:
            sys.setprofile(None)
            raise KeyboardInterrupt

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(before)
    return seen


def left_behind(base: Any, plain: type) -> list[str]:
    """What is not as it is where nothing runs."""
    ours = ("forward", "mtpkern_turn", "mtpkern_packed")
    found = [name for module in base.modules() for name in ours if name in vars(module)]
    hooks = [hook for module in base.modules() for hook in module._forward_pre_hooks.values()]
    found += ["hook" for hook in hooks if "watched" in repr(hook)]
    found += ["config"] * (type(base.config) is not plain) + ["blocks"] * bool(routing._everywhere)
    found += ["route"] * bool(routing._here.get({})) + ["recorder"] * (recorder._recorder.get() is not None)
    found += ["mode"] * (torch._C._len_torch_dispatch_stack() > 0) + ["turn"] * _turns[base].lock.locked()
    gate = gate_of(base)
    return found + ["gate"] * (gate is not None and (gate.rows is not False or gate.opened is not False))


@pytest.mark.parametrize("adapted", [False, pytest.param(True, marks=pytest.mark.slow("interrupted::[False]"))])
@pytest.mark.parametrize("packs", [True], indirect=True)
def test_an_interrupt_anywhere_leaves_nothing(adapted: bool, packs: bool, tiny: SimpleNamespace) -> None:
    model = tiny.adapted(tiny.model("llama")) if adapted else tiny.model("llama")
    base = model.get_base_model() if adapted else model
    plain = type(base.config)

    def run() -> None:
        mtpkern.release_graphs(model)
        for _ in range(2):
            generate(tiny, model, max_new_tokens=8)

    wanted = generate(tiny, model)
    places = calls_of(run)
    kept: BaseException | None = None
    for place, n in places.items():
        try:
            calls_of(run, (place, (n + 1) // 2))
        except KeyboardInterrupt as error:
            kept = error  # as a notebook keeps the last one
        assert left_behind(base, plain) == [], place
    assert kept is not None
    assert len(places) > 40
    assert generate(tiny, model).equal(wanted)


def test_an_interrupted_training_step_lets_the_model_go(tmp_path: Path) -> None:
    """A notebook keeps the traceback, and with it a context that has been kept from ending."""
    run = trainer(tmp_path, teacher_target="gt", max_steps=1, save_strategy="no")
    plain, kept = type(run.model.config), []
    places = [place for place in calls_of(run.train) if place[2] in ("training_step", "_span_attention")]
    ends = [place for place in places if place[1] in ("__enter__", "__exit__")]
    assert len(ends) >= 2
    for place in ends:
        with pytest.raises(KeyboardInterrupt) as interrupted:
            calls_of(run.train, (place, 1))
        kept.append(interrupted)
        assert left_behind(run.model, plain) == [], place
