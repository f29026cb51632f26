"""A gated training step as CUDA graphs: forward and backward of a shape are captured once and replayed from then on.

A step of a small model is thousands of small launches, for which the host needs several times as long as the device; a
graph is one. Another shape makes another graph, so shapes are kept few: batches are padded to numbers of tokens, spans
and rows of the prefix pass that only grow. Padding is seen by no row and takes no draw. A shape is captured when it
comes again.

Nothing is believed of a graph. Before its first replay counts, the same batch has run as it is, and loss and gradients
of the two are compared: where capturing fails or they differ, training goes on without graphs, which a RuntimeWarning
announces. Where weights have moved since, as decoding on the way may do, all is captured anew.

Memory   one pool for all graphs, and the gradients of each
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mtpkern import graph
from mtpkern.graph import on_side_stream
from mtpkern.model import plain_tensors
from mtpkern.output import first_line
from mtpkern.train.layout import pinned, send

# Steps as they are before a capture: the first compiles kernels and layers.
WARM_UP = 2
# Tokens of a batch and rows of a prefix pass come in multiples of these; a first pass gets so much room besides.
TOKENS, ROWS, ROOM = 128, 1024, 1.06
# Graphs that are kept; further shapes run as they are.
KEPT = 48
# How far the gradients of a graph may lie from those of the step itself, whose sums have no fixed order.
TOLERANCE = 0.05

Step = Callable[[Mapping[str, Tensor]], Tensor]


class CapturedStep(graph.CapturedStep):
    """One shape: tensors that are read, the graph, what it writes. Raises RuntimeError where it cannot be captured."""

    def __init__(
        self, step: Step, inputs: Mapping[str, Tensor], parameters: Sequence[nn.Parameter], beside: CapturedStep | None
    ) -> None:
        device = parameters[0].device
        self.inputs = {name: x.to(device, copy=True) for name, x in inputs.items()}

        def run() -> None:
            self.output = step(self.inputs)  # leaves gradients in the parameters, which have none before

        # What has been left by steps as they are is of no use to a pool of its own.
        torch.cuda.empty_cache()
        super().__init__(run, device, beside)
        self.gradients = [parameter.grad for parameter in parameters]


class CapturedSteps:
    """Runs steps through the graphs of their shapes.

        steps = CapturedSteps(model)
        loss = steps(("gt", 5), inputs, step)[0]

    A call returns what `step` does, [n] float32, and leaves its gradients in the parameters that are trained.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        # All that a graph may read, and where it lay at the last step.
        self._tensors = plain_tensors(model)
        self._places = self._where()
        self.device = self.parameters[0].device
        self.refused = False
        self._steps: dict[Hashable, CapturedStep] = {}
        self._seen: set[Hashable] = set()
        self._tokens = self._spans = 0
        # By the number of texts.
        self._rows: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._steps)

    def tokens(self, n: int) -> int:
        """Tokens to which a batch is padded whose longest text has n."""
        if n > self._tokens:
            self._tokens = -(-n // TOKENS) * TOKENS
            self._drop()
        return self._tokens

    def spans(self, n: int) -> int:
        """Spans to which a batch is padded whose text with the most has n."""
        if n > self._spans:
            self._spans = n
            self._drop()
        return self._spans

    def rows(self, texts: int, n: int) -> int:
        """Rows of the prefix pass of so many texts with n tokens together."""
        if n > self._rows.get(texts, 0):
            self._rows[texts] = -(-int(n * ROOM) // ROWS) * ROWS
        return self._rows[texts]

    def __call__(self, kind: Hashable, inputs: Mapping[str, Tensor], step: Step) -> Tensor:
        """One step; `kind` says what it depends on besides its inputs, which may lie on the host."""
        before, self._places = self._places, self._where()
        if self._places != before:
            self._drop()
        key = kind, tuple((name, x.shape) for name, x in inputs.items())
        if key not in self._steps and key in self._seen and not self.refused and len(self._steps) < KEPT:
            self._capture(key, inputs, step)
        self._seen.add(key)
        captured = self._steps.get(key)
        self._forget()
        if captured is None:
            return step({name: send(x, self.device) for name, x in inputs.items()})
        for name, x in inputs.items():
            captured.inputs[name].copy_(pinned(x, self.device), non_blocking=True)
        captured.replay()
        for parameter, gradient in zip(self.parameters, captured.gradients):
            parameter.grad = gradient
        # The next replay writes over it.
        return captured.output.clone()

    def _capture(self, key: Hashable, inputs: Mapping[str, Tensor], step: Step) -> None:
        """Capture a shape, if a replay does what the step does."""
        sent = {name: send(x, self.device) for name, x in inputs.items()}
        with on_side_stream(self.device):
            for _ in range(WARM_UP):
                self._forget()
                output = step(sent)
        want = [output, *(p.grad for p in self.parameters)]
        self._forget()
        try:
            captured = CapturedStep(step, inputs, self.parameters, next(iter(self._steps.values()), None))
            self._forget()
            captured.replay()
            reason = _difference([captured.output, *captured.gradients], want)
        except RuntimeError as error:  # out of memory is one, too
            reason = first_line(error)
        if not reason:
            self._steps[key] = captured
            return
        self.refused = True
        self._steps.clear()
        self._forget()
        warnings.warn(
            "training steps could not be captured in CUDA graphs and run without them, which is slower; set cuda_graph:"
            f" false, or look into it: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )

    def _where(self) -> list[int]:
        return [x.data_ptr() for x in self._tensors]

    def _drop(self) -> None:
        """What has been captured of shapes that come no more, or of weights that lie elsewhere now."""
        self._steps.clear()
        self._seen.clear()

    def _forget(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def _difference(got: Sequence[Tensor | None], want: Sequence[Tensor | None]) -> str:
    """What differs between two runs of a step: loss and statistics, then the gradients; empty where nothing does."""
    for what, pairs in (("outputs", [(got[0], want[0])]), ("gradients", list(zip(got[1:], want[1:])))):
        if any((a is None) != (b is None) for a, b in pairs):
            return f"a replay has other {what} than the step itself"
        known = [(a.float(), b.float()) for a, b in pairs if a is not None and b is not None]
        apart = torch.stack([(a - b).square().sum() for a, b in known]).sum().sqrt()
        size = torch.stack([b.square().sum() for _, b in known]).sum().sqrt()
        ratio = float(apart / size.clamp(min=1e-12))
        # What is no number fails, too, unless the step itself has none: then the run ends by itself.
        if not ratio <= TOLERANCE and bool(size.isfinite()):
            return f"the {what} of a replay lie {ratio:.3g} of their size from those of the step itself"
    return ""
