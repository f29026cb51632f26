"""What a call takes beyond its passes: every second of it is counted once."""

import time

import pytest
import torch

from mtpkern import loop
from mtpkern.bench import call
from mtpkern.decoder import Decoder

CPU = torch.device("cpu")


@pytest.mark.parametrize("where", ["around", "between", "pass"])
def test_time_is_told_apart(tiny, monkeypatch, where):
    now = [0.0]
    monkeypatch.setattr(time, "process_time", lambda: now[0])

    def slower(kind, name):
        own = getattr(kind, name)

        def method(*args, **kwargs):
            now[0] += 1.0
            return own(*args, **kwargs)

        monkeypatch.setattr(kind, name, method)

    slower(*{"around": (Decoder, "__init__"), "between": (loop, "_fit"), "pass": (Decoder, "_forward")}[where])
    (*_, table) = call.measure_model(tiny.model("llama"), (2,), rounds=1, new_tokens=5)
    record = table.records[0]
    # The prefill's pass is of the model itself; four more bring the other tokens.
    expected = {"around": (1, 1, 0), "between": (4, 0, 4), "pass": (4, 0, 0)}[where]
    assert tuple(record[name].median for name in ("total", "around", "between")) == expected
    assert table.goals[0].met is (where == "pass")
