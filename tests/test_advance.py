"""Advance against a model of it in plain Python, and by hand."""

import math

import pytest
import torch
from hypothesis import example, given, settings

from mtpkern.kernels.advance import advance, advance_at_once, advance_triton
from mtpkern.kernels.state import FAULT, LIMIT, RUNNING, STOPPED
from support.advancing import MASK, Form, Machine, decode, scenarios, state
from support.slow import slow_but

FORMS = [advance, advance_at_once, pytest.param(advance_triton, marks=pytest.mark.kernel)]


@pytest.mark.parametrize("form", slow_but([advance, advance_at_once], advance))
@given(scenario=scenarios())
@settings(max_examples=100, derandomize=True, deadline=None)
def test_equals_the_plain_python_model(form: Form, scenario: dict[str, object]) -> None:
    decode(form, **scenario)


# Passes that try drafts and passes without a row to try any, in which other parts of the record are forgotten.
SCARCE = {
    "k": 4,
    "rows": 6,
    "price": 0.0,
    "verify": True,
    "capped": True,
    "masks": 0,
    "threshold": 0.5,
    "prompts": [2, 1, 3],
    "new_tokens": [14, 16, 18],
    "stops": set(),
    "vocabulary": 10,
    "agreement": 1.0,
    "sureness": 1.0,
    "fault": 0.0,
    "dtype": torch.float32,
    "seed": 0,
}


@pytest.mark.kernel
@pytest.mark.parametrize("form", [advance_triton])
@given(scenario=scenarios(interpreted=True))
@example(scenario=SCARCE)
@settings(max_examples=10, derandomize=True, deadline=None)
def test_kernel_equals_the_plain_python_model(form: Form, scenario: dict[str, object]) -> None:
    decode(form, **scenario)


@pytest.mark.parametrize("form", [advance])
@given(scenario=scenarios(behind_drafts=True))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_masks_behind_drafts_equal_the_plain_python_model(form: Form, scenario: dict[str, object]) -> None:
    decode(form, **scenario)


@pytest.mark.kernel
@pytest.mark.parametrize("form", [advance_triton])
@given(scenario=scenarios(behind_drafts=True, interpreted=True))
@settings(max_examples=8, derandomize=True, deadline=None)
def test_kernel_with_masks_behind_drafts_equals_the_plain_python_model(form: Form, scenario: dict[str, object]) -> None:
    decode(form, **scenario)


# What follows is worked by hand: it holds the model above to the text as much as it holds `advance`.


def machine_of_one(form: Form, *, k: int, new_tokens: int, verify: bool, **options: object) -> Machine:
    options = {"rows": 2 * k - 1, "threshold": 0.5, "stops": set(), **options}
    return Machine(form, [[50, 51]], [new_tokens], k=k, verify=verify, **options)


def new_tokens_of(machine: Machine) -> list[int]:
    return machine.sequences.tokens[0, 2 : machine.sequences.length[0]].tolist()


SURE = [1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("form", FORMS)
def test_three_strategies_by_hand(form: Form) -> None:
    confidence = [0.9, 0.8, 0.3, 0.9]
    static = machine_of_one(form, k=4, new_tokens=20, verify=False, threshold=-1.0)
    static.take_in([([1, 2, 3, 4], confidence)])
    assert (new_tokens_of(static), state(static)) == ([1, 2, 3, 4], (RUNNING, 4, [4]))
    assert static.rows.token.tolist() == [1, 2, 3, 4, MASK, MASK, MASK]
    assert static.rows.slot.tolist() == [2, 3, 4, 5, 6, 7, 8]

    adaptive = machine_of_one(form, k=4, new_tokens=20, verify=False)
    adaptive.take_in([([1, 2, 3, 4], confidence)])
    assert (new_tokens_of(adaptive), state(adaptive)) == ([1, 2], (RUNNING, 2, [2]))
    assert adaptive.rows.token.tolist() == [1, 2, MASK, MASK, MASK, 0, 0]
    assert adaptive.rows.slot.tolist() == [2, 3, 4, 5, 6, adaptive.capacity, adaptive.capacity]

    verified = machine_of_one(form, k=4, new_tokens=20, verify=True)
    verified.take_in([([1, 2, 3, 4], confidence)])
    assert (new_tokens_of(verified), state(verified)) == ([1, 2], (RUNNING, 2, [1]))
    # The draft 2 is confirmed, and 7 and 8 behind it are the next drafts.
    verified.take_in([([2, 6, 7, 8, 9], [0.1, 0.1, 0.9, 0.9, 0.4])])
    assert (new_tokens_of(verified), state(verified)) == ([1, 2, 6, 7, 8], (RUNNING, 3, [1, 2]))
    # 7 is confirmed, 8 is not: 5 takes its place, and what the masks behind 8 say is void.
    verified.take_in([([7, 5, 3, 1, 1, 1], [1.0] * 6)])
    assert (new_tokens_of(verified), state(verified)) == ([1, 2, 6, 7, 5], (RUNNING, 1, [1, 2, 2]))
    assert verified.rows.token.tolist() == [5, MASK, MASK, MASK, 0, 0, 0]
    assert verified.rows.slot.tolist()[:4] == [6, 7, 8, 9]


@pytest.mark.parametrize("form", FORMS)
def test_masks_behind_a_refuted_drafts_place_by_hand(form: Form) -> None:
    machine = machine_of_one(form, k=3, new_tokens=20, verify=True, masks=3, rows=8)
    machine.take_in([([1, 2, 3], [0.1, 0.9, 0.6])])
    # 2 is right with 0.9, 3 with 0.6: the chain ends before 2 with a chance of 0.1, before 3 with one of 0.36. Of three
    # masks the group behind 2 has two, the one behind 1 what is left.
    assert (new_tokens_of(machine), state(machine)) == ([1, 2, 3], (RUNNING, 3, [1]))
    assert machine.rows.token.tolist() == [1, 2, 3, *[MASK] * 5]
    assert machine.rows.position.tolist() == [2, 3, 4, 5, 6, 3, 4, 5]
    assert machine.rows.slot.tolist() == [5, 6, 7, 8, 9, 0, 1, 2]
    assert machine.rows.prefix_end.tolist() == [6, 7, 8, 8, 8, 6, 7, 7]
    assert machine.rows.span_start.tolist() == [6, 7, 8, 8, 8, 0, 1, 1]
    assert machine.rows.behind.tolist() == [[1, 2, 2]]
    # 2 stands, 3 does not: 7 is in its place, and behind it come 8 and 9, from the masks behind 2.
    machine.take_in([([2, 7, 4, 5, 6, 3, 8, 9], [0.1, 0.1, 0.1, 0.9, 0.9, 0.9, 0.8, 0.7])])
    assert (new_tokens_of(machine), state(machine)) == ([1, 2, 7, 8, 9], (RUNNING, 3, [1, 2]))
    # Not even 8 stands: one mask was left for behind 7, and what stands behind it does not count.
    assert machine.rows.behind.tolist() == [[1, 2, 2]]
    machine.take_in([([5, 0, 0, 0, 0, 6, 0, 0], [1.0] * 8)])
    assert (new_tokens_of(machine), state(machine)) == ([1, 2, 7, 5, 6], (RUNNING, 2, [1, 2, 1]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sure", [False, True])
def test_threshold_is_to_be_passed_not_met(form: Form, sure: bool) -> None:
    above = torch.nextafter(torch.tensor(0.9), torch.tensor(1.0)).item()
    met = torch.tensor(0.9).item()
    for verify in (False, True):
        machine = machine_of_one(form, k=2, new_tokens=9, verify=verify, threshold=met)
        machine.take_in([([1, 2], [above if sure else met, above])])
        # The first token needs no confidence; in ConfAdapt the second does not stand behind an unsure first.
        assert new_tokens_of(machine) == ([1, 2] if sure or verify else [1])
        machine = machine_of_one(form, k=2, new_tokens=9, verify=verify, threshold=met)
        machine.take_in([([1, 2], [above, above if sure else met])])
        assert new_tokens_of(machine) == ([1, 2] if sure else [1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_stop_at_every_place_of_a_block(form: Form, verify: bool, at: int) -> None:
    machine = machine_of_one(form, k=4, new_tokens=20, verify=verify, stops={90, 91})
    words = [1, 2, 3, 4]
    words[at] = 91
    blocks = []
    if verify:
        machine.take_in([([9, *words[:3]], SURE)])
        # A stop token among the drafts stops nothing yet, and ends what the next pass has; the last is none of them.
        rows = min(at + 2, 4) if at < 3 else 7
        assert state(machine) == (RUNNING, min(at + 2, 4), [1])
        assert machine.rows.start.tolist() == [0, rows]
        machine.take_in([([*words, 5, 6, 7][:rows], [1.0] * rows)])
        words, blocks = [9, *words], [1]
    else:
        machine.take_in([(words, SURE)])
    assert new_tokens_of(machine) == words[: len(blocks) + at + 1]
    assert state(machine) == (STOPPED, 0, [*blocks, at + 1])
    assert not machine.rows.start.any()


@pytest.mark.parametrize("form", FORMS)
def test_a_refuted_stop_token_stops_nothing(form: Form) -> None:
    machine = machine_of_one(form, k=4, new_tokens=20, verify=True, stops={90})
    machine.take_in([([1, 90, 3, 4], SURE)])
    assert new_tokens_of(machine) == [1, 90]
    assert machine.rows.start.tolist() == [0, 2]
    machine.take_in([([2, 90], SURE[:2])])
    assert (new_tokens_of(machine), state(machine)) == ([1, 2], (RUNNING, 1, [1, 1]))
    assert machine.rows.start.tolist() == [0, 4]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("new_tokens", [1, 2, 3, 4, 5, 6, 7, 8])
def test_limit_is_met_and_never_passed(form: Form, verify: bool, new_tokens: int) -> None:
    machine = machine_of_one(form, k=4, new_tokens=new_tokens, verify=verify)
    token = iter(range(1, 100))
    said: list[int] = []
    while machine.running:
        drafts = new_tokens_of(machine)[len(said) :]
        count = machine.counts[0]
        words = drafts + [next(token) for _ in range(count - len(drafts))] if verify else list(range(1, count + 1))
        machine.take_in([(words, [1.0] * count)])
        said = new_tokens_of(machine)[: sum(machine.texts[0].blocks)]
    assert len(new_tokens_of(machine)) == new_tokens
    assert state(machine)[:2] == (LIMIT, 0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("verify", [False, True])
def test_stop_token_at_the_limit_counts_as_stop(form: Form, verify: bool) -> None:
    machine = machine_of_one(form, k=4, new_tokens=1, verify=verify, stops={90})
    machine.take_in([([90, 2, 3, 4], SURE)])
    assert (new_tokens_of(machine), state(machine)) == ([90], (STOPPED, 0, [1]))
    machine = machine_of_one(form, k=4, new_tokens=1, verify=verify, stops={90})
    machine.take_in([([1, 90, 3, 4], SURE)])
    assert (new_tokens_of(machine), state(machine)) == ([1], (LIMIT, 0, [1]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("row", [0, 1, 2, 3])
def test_fault_ends_one_sequence_and_no_other(form: Form, verify: bool, row: int) -> None:
    machine = Machine(form, [[50], [51], [52]], [9, 9, 9], k=4, rows=21, verify=verify, threshold=0.5, stops=set())
    machine.take_in([([1, 2, 3, 4], SURE)] * 3)
    faulty = [1.0] * machine.counts[1]
    faulty[row] = math.nan
    machine.take_in([([2, 3, 4, 5, 6, 7, 8], [1.0] * 7), ([2, 3, 4, 5, 6, 7, 8], faulty), ([9] * 7, [1.0] * 7)])
    assert machine.sequences.status.tolist() == [RUNNING, FAULT, RUNNING]
    assert machine.sequences.passes.tolist() == [2, 1, 2]
    assert machine.sequences.length[1] == (2 if verify else 5)
    assert machine.rows.start[1] == machine.rows.start[2]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("rows", "masks"),
    [
        (12, [2, 1, 0]),  # the remainder goes to the first
        (13, [2, 2, 0]),
        (14, [3, 2, 0]),
        (15, [3, 3, 0]),
        (16, [3, 3, 0]),  # k - 1 masks are all that anybody gets: one row stays unused
    ],
)
def test_budget_is_dealt_evenly(form: Form, rows: int, masks: list[int]) -> None:
    machine = Machine(form, [[50], [51], [52]], [20, 20, 4], k=4, rows=rows, verify=False, threshold=0.5, stops=set())
    two, four, three = [1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]
    machine.take_in([([1, 2, 3, 4], confidence) for confidence in (two, four, three)])
    # The third sequence has one token to go, for which it needs no mask.
    pending = machine.sequences.pending.tolist()
    assert pending == [2, 4, 3]
    assert [count - p for count, p in zip(machine.rows.start.diff().tolist(), pending)] == masks
