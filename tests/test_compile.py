"""torch.compile sees the ops of a step as they are: mutations declared, shapes foretold."""

from typing import Any

import pytest
import torch
from torch import Tensor

# Importing the ops registers them.
from mtpkern.kernels.advance import advance  # noqa: F401
from mtpkern.kernels.decode_attention import decode_attention
from mtpkern.kernels.gated_lora import gated_expand, gated_lora
from mtpkern.kernels.kv_write import kv_write
from mtpkern.kernels.linear import few_rows_linear, new_counters
from mtpkern.kernels.packed_rows import PackedRows
from mtpkern.kernels.readout import readout
from mtpkern.kernels.scoring import Scoring
from mtpkern.kernels.state import Rows, Sequences, Terms

B, R, HKV, D, C = 2, 5, 2, 4, 6
CPU = torch.device("cpu")
SEQ, SLOT = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([2, 3, 1, C, C])
START = torch.tensor([0, 2, 3])


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def arguments(name: str) -> tuple[Any, ...]:
    if name == "readout":
        return draw(R, 9), 3
    if name == "few_rows_linear":
        return draw(2, R, 6), draw(7, 6), draw(7), new_counters(CPU)
    if name == "gated_lora":
        gate = torch.tensor([False, True, True, False, False])
        as_, bs = [draw(2, 6), draw(3, 6)], [draw(7, 2), draw(3, 3)]
        return [draw(R, 7), draw(R, 3)], draw(R, 6), gate, as_, bs, [0.5, 2.0]
    if name == "gated_expand":
        gate = torch.tensor([False, True, True, False, False])
        *outs, low, lower = draw(R, 15).split([7, 3, 2, 3], dim=1)
        return outs, [low, lower], gate, [draw(7, 2), draw(3, 3)], [0.5, 2.0]
    caches = draw(B, HKV, C + 1, D), draw(B, HKV, C + 1, D + 2)
    if name == "kv_write":
        return *caches, draw(R, HKV, D), draw(R, HKV, D + 2), SEQ, torch.tensor([2, 3, 1, 4, C])
    if name == "decode_attention":
        return (
            draw(R, 2 * HKV, D),
            draw(R, HKV, D),
            draw(R, HKV, D + 2),
            *caches,
            *(SEQ, SLOT, START, 3, SLOT + 1, SLOT + 1, 1),
            *(0.5, 2, None, draw(2 * HKV)),
            *(False, None),
        )
    sequences, rows = Sequences.allocate(B, C, C, CPU), Rows.allocate(R, B, CPU, 2)
    sequences.length.fill_(2)
    sequences.pending.fill_(1)
    sequences.limit.fill_(C)
    rows.start.copy_(torch.tensor([0, 2, 4]))
    read = torch.tensor([4, 5, 6, 7]), torch.tensor([0.9, 0.8, 0.7, 0.9])
    state = (*vars(sequences).values(), *vars(rows).values(), *vars(Terms.allocate(1, B, CPU)).values())
    return *state, *read, 2, True, 8, 1


@pytest.mark.parametrize(
    "name", ["readout", "kv_write", "gated_lora", "gated_expand", "few_rows_linear", "decode_attention", "advance"]
)
def test_what_is_declared_is_what_happens(name: str) -> None:
    op = getattr(torch.ops.mtpkern, name).default
    torch.library.opcheck(op, arguments(name), test_utils=("test_schema", "test_faketensor"))


def test_eager_calls_do_not_go_through_the_dispatcher() -> None:
    """It would cost more than the ops do on a CPU."""

    class Watcher(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func.namespace != "mtpkern"
            return func(*args, **(kwargs or {}))

    with Watcher():
        readout(*arguments("readout"))
        kv_write(*arguments("kv_write"))
        gated_lora(*arguments("gated_lora"))
        gated_expand(*arguments("gated_expand"))
        few_rows_linear(*arguments("few_rows_linear"))
        given = arguments("decode_attention")
        decode_attention(*given[:5], PackedRows(*given[5:12]), Scoring(*given[12:16]))
