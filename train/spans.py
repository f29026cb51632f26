"""Spans of an evaluation, kept one by one: how sure the student was of each token, and the teacher's loss on it.

Against the data's own tokens (teacher_target gt) there is no teacher, and nothing is kept, unless the student is a
gated adapter: its base then reads the spans until enough are kept, a pass more for these batches.

Source   arXiv 2602.06019, figure of confidence against the teacher's loss on the student's span
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mtpkern.kernels.head import Head
from mtpkern.output import write_whole
from mtpkern.training_plots import SPANS

MOST = 128


@dataclass
class KeptSpans:
    """The first `MOST` whole spans that it is shown.

    kept = KeptSpans()
    mtp_loss(..., kept=kept)
    kept.write("out", step=100)     # out/spans.jsonl, which `mtpkern plot out` draws
    """

    confidence: list[list[float]] = field(default_factory=list)
    teacher_loss: list[list[float]] = field(default_factory=list)

    @property
    def full(self) -> bool:
        """Whether no more are taken."""
        return len(self.confidence) >= MOST

    @torch.no_grad()
    def take(self, token: Tensor, confidence: Tensor, keep: Tensor, wanted: Tensor, head: Head) -> None:
        """Look at a batch.

        token, confidence, keep  [B, M, K]: the student's spans, how sure it was, which rows have a loss
        wanted, head             [B * M * K, H] the teacher's hidden states on these spans, and its head
        """
        K = token.shape[-1]
        whole = keep.reshape(-1, K).all(-1).nonzero().squeeze(1)[: MOST - len(self.confidence)]
        if not len(whole):
            return
        # A few spans at a time: a row of logits may be as long as 250,000 tokens.
        for some in whole.split(16):
            said = token.reshape(-1, K)[some]
            logits = head.logits(wanted.view(-1, K, wanted.shape[-1])[some].flatten(0, 1)).float()
            loss = torch.nn.functional.cross_entropy(logits, said.flatten(), reduction="none").view(-1, K)
            self.confidence += confidence.reshape(-1, K)[some].float().tolist()
            self.teacher_loss += loss.tolist()

    def write(self, folder: str | Path, step: int) -> None:
        """Add them to the folder's file; those of this step and later ones, of a run that went back, are left out."""
        if not self.confidence:
            return
        path = Path(folder) / SPANS
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        lines = [line for line in before if json.loads(line)["step"] < step]
        for confidence, loss in zip(self.confidence, self.teacher_loss, strict=True):
            lines.append(json.dumps({"step": step, "confidence": confidence, "teacher_loss": loss}))
        write_whole(path, "\n".join(lines) + "\n")
