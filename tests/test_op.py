"""An op: the form that a device takes, and the operator that torch.compile sees."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from mtpkern.kernels import op as module
from mtpkern.kernels.op import op


@dataclass(frozen=True)
class Scale:
    factor: float
    bias: Tensor | None = None
    seen: list[int] = field(default_factory=list, compare=False)


@op(mutates=["y"], float64=False, fake=lambda y, x, *_: x.new_empty(x.shape))
def _scaled(y: Tensor, x: Tensor, scale: Scale, *, twice: bool = False) -> Tensor:
    """What it does."""
    scale.seen.append(1)
    y += 1
    out = x * scale.factor * (2 if twice else 1)
    return out if scale.bias is None else out + scale.bias


@_scaled.kernel
def _in_a_kernel(y, x, scale, *, twice=False):
    return x * 0 - 1


X = torch.tensor([1.0, 2.0])


def test_it_is_its_torch_form_where_there_is_no_kernel() -> None:
    y, scale = torch.zeros(2), Scale(3.0, torch.ones(2))
    assert _scaled(y, X, scale, twice=True).tolist() == [7.0, 13.0]
    assert y.tolist() == [1.0, 1.0]
    assert scale.seen == [1]
    assert _scaled.__doc__ == "What it does."


@pytest.mark.parametrize(("dtype", "kernel"), [(torch.float32, True), (torch.float64, False)])
def test_the_kernel_runs_where_the_device_takes_it(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kernel: bool
) -> None:
    monkeypatch.setattr(module, "takes_kernel", lambda x: True)
    y, x = torch.zeros(2, dtype=dtype), X.to(dtype)
    assert (_scaled(y, x, Scale(2.0))[0] == -1) == kernel
    assert (_scaled(y=y, x=x, scale=Scale(2.0))[0] == -1) == kernel
    assert _scaled.reference(y, x, Scale(2.0)).tolist() == [2.0, 4.0]


@pytest.mark.parametrize("scale", [Scale(3.0), Scale(3.0, torch.ones(2))], ids=["no bias", "bias"])
@pytest.mark.parametrize("given", [{}, {"twice": True}], ids=str)
def test_compiled_it_is_one_operator_that_does_the_same(scale: Scale, given: dict[str, Any]) -> None:
    y, seen = torch.zeros(2), []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    out = torch.compile(lambda y, x: _scaled(y, x, scale, **given), backend=backend, fullgraph=True)(y, X)
    assert seen == [torch.ops.mtpkern._scaled.default]
    assert torch.equal(out, _scaled(torch.zeros(2), X, scale, **given))
    assert y.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("more", [((Scale(2.0), True), {}), ((Scale(2.0),), {"thrice": True})], ids=["place", "name"])
@pytest.mark.parametrize("compiled", [False, True])
def test_an_argument_that_there_is_not_is_refused(compiled: bool, more: tuple[Any, dict[str, Any]]) -> None:
    def call(y: Tensor, x: Tensor) -> Tensor:
        return _scaled(y, x, *more[0], **more[1])

    torch._dynamo.reset()
    with pytest.raises(TypeError, match=r"takes 3 positional|thrice"):
        (torch.compile(call, backend="eager") if compiled else call)(torch.zeros(2), X)


def test_what_is_declared_is_what_happens() -> None:
    operator = torch.ops.mtpkern._scaled.default
    assert str(operator._schema) == (
        "mtpkern::_scaled(Tensor(a0!) y, Tensor x, float scale_factor, Tensor? scale_bias, bool twice) -> Tensor"
    )
    torch.library.opcheck(operator, (torch.zeros(2), X, 2.0, None, True), test_utils=("test_schema", "test_faketensor"))
