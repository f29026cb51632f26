"""A thin transformers.Trainer for multi-token prediction: resume, logging, evaluation and saving come with it.

Four rules hold it up (docs/log.md): backbone, readout, teacher pass and loss run inside one wrapped model call; the
head is read as a weight and never called as a module; k and spans are pure functions of (seed, step, micro-step,
rank), so that a resumed run equals an uninterrupted one; trained weights are float32.

Source   arXiv 2602.06019, training details
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from mtpkern.attention import attention_context
from mtpkern.model import record_settings, resolve_mask_token
from mtpkern.train.layout import Layout, build_layout, draw_k, draw_prefixes
from mtpkern.train.objective import MTPLoss, SpanContext, mtp_loss

# Evaluation draws its spans from a stream of their own, the same for every batch and every evaluation.
_EVALUATION_STEP = -1


@dataclass
class MTPConfig(TrainingArguments):
    """TrainingArguments and what multi-token prediction adds; defaults are the paper's."""

    k_min: int = field(default=2, metadata={"help": "Smallest number of predictions of a span."})
    k_max: int = field(default=16, metadata={"help": "Largest; k is drawn anew each step, the same for all ranks."})
    num_spans: int | None = field(default=None, metadata={"help": "Spans a sequence; N // (2 * k_max) unless given."})
    spacing: str = field(default="stride", metadata={"help": "'stride' of 2k at a random offset, or 'random'."})
    layout: str = field(
        default="tokens", metadata={"help": "What max_length counts: 'tokens', or with 'paper' the masks too."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Longer texts are cut off; None cuts none."})
    response_only: bool = field(default=True, metadata={"help": "No spans before the end of the prompt."})
    teacher_target: str = field(default="hard", metadata={"help": "'hard', 'soft', or 'gt' (no teacher pass)."})
    prefix_weight: float = field(default=0.0, metadata={"help": "Weight of a next-token loss on the answer's rows."})
    static_shape: bool = field(default=False, metadata={"help": "Reserve mask rows for k_max at every k."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Columns are the collator's business."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.k_min <= self.k_max:
            raise ValueError(f"1 <= k_min <= k_max must hold; got k_min={self.k_min}, k_max={self.k_max}")
        for name, allowed in (
            ("teacher_target", ("hard", "soft", "gt")),
            ("spacing", ("stride", "random")),
            ("layout", ("tokens", "paper")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        if self.layout == "paper" and self.max_length is None:
            raise ValueError("layout='paper' counts masks into max_length; give max_length (the paper: 160)")
        if self.deepspeed:
            raise ValueError("DeepSpeed is untested here and refused; use FSDP or DDP")


class MTPCollator:
    """Right-pads {"input_ids": list, "prompt_length": int} to the longest text of the batch, or to a fixed length."""

    def __init__(self, pad_token_id: int, pad_to: int | None = None) -> None:
        self.pad_token_id = pad_token_id
        self.pad_to = pad_to

    def __call__(self, batch: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """input_ids [B, N], lengths [B] and prompt_lengths [B], all int64. Raises ValueError for a longer text."""
        lengths = torch.tensor([len(x["input_ids"]) for x in batch])
        longest = int(lengths.max())
        if self.pad_to is not None and longest > self.pad_to:
            raise ValueError(f"texts must have at most pad_to = {self.pad_to} tokens; got {longest}: cut or raise it")
        input_ids = torch.full((len(batch), self.pad_to or longest), self.pad_token_id)
        for i, x in enumerate(batch):
            input_ids[i, : len(x["input_ids"])] = torch.tensor(x["input_ids"])
        return {
            "input_ids": input_ids,
            "lengths": lengths,
            "prompt_lengths": torch.tensor([x["prompt_length"] for x in batch]),
        }


@contextmanager
def _forward_as(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let model(...) run `forward`, so that the hooks of DDP and FSDP around the call fire as ever."""
    before = vars(model).get("forward")
    setattr(model, "forward", forward)  # noqa: B010 (an attribute of the instance hides the method)
    try:
        yield
    finally:
        if before is None:
            delattr(model, "forward")
        else:
            setattr(model, "forward", before)  # noqa: B010


class MTPTrainer(Trainer):
    """Trainer whose loss is `mtpkern.train.objective.mtp_loss`.

    model, teacher   the student with float32 weights; its frozen original, not needed for teacher_target "gt"
    mask_token_id    of the student; read from its config unless given

    Batches come from `MTPCollator`. The saved model is a plain Hugging Face checkpoint whose config records the mask
    token and k_max. Raises ValueError for a missing teacher and for trained weights below float32.

        trainer = MTPTrainer(model=model, teacher=teacher, args=MTPConfig("out", k_max=8), train_dataset=data,
                             data_collator=MTPCollator(tokenizer.pad_token_id), processing_class=tokenizer)
        trainer.train()
    """

    args: MTPConfig

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        args: MTPConfig,
        teacher: PreTrainedModel | None = None,
        mask_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.mask_token_id = resolve_mask_token(model, mask_token_id)
        if teacher is None and args.teacher_target != "gt":
            raise ValueError(f"teacher_target {args.teacher_target!r} needs teacher=, the frozen original model")
        narrow = {p.dtype for p in model.parameters() if p.requires_grad} - {torch.float32, torch.float64}
        if narrow:
            raise ValueError(f"trained weights must be float32; got {narrow}: load with dtype=torch.float32, bf16=True")
        record_settings(model, mask_token_id=self.mask_token_id, k_max=args.k_max)
        super().__init__(model=model, args=args, **kwargs)
        self.teacher = None if teacher is None else teacher.requires_grad_(False).eval().to(self.args.device)
        # Our loss is divided by the rows of the whole accumulated batch already.
        self.loss_is_scaled_for_ga = True
        eos = model.generation_config.eos_token_id if model.generation_config else None
        eos = model.config.eos_token_id if eos is None else eos
        if eos is None:
            raise ValueError("the model's config names no eos_token_id, behind which spans end; set it")
        self.eos_token_ids = torch.tensor([eos] if isinstance(eos, int) else list(eos), device=self.args.device)
        self._sums: list[MTPLoss] = []

    def plan(self, batch: dict[str, Tensor], *, k: int, step: int, micro_step: int) -> dict[str, Any]:
        """The batch with its layout: a pure function of the batch's lengths, the seed, the step and the rank."""
        args = self.args
        tokens, lengths, prompts = batch["input_ids"], batch["lengths"].cpu(), batch["prompt_lengths"].cpu()
        limit = args.max_length or tokens.shape[1]
        num_spans = args.num_spans or max(1, limit // (2 * args.k_max))
        if args.layout == "paper":
            limit -= num_spans * (k - 1)
        tokens = tokens[:, :limit]
        lengths = lengths.clamp(max=limit)
        prefix = draw_prefixes(
            lengths,
            prompts,
            k,
            num_spans,
            spacing=args.spacing,  # type: ignore[arg-type]
            counting=args.layout,  # type: ignore[arg-type]
            response_only=args.response_only,
            seed=args.seed,
            step=step,
            micro_step=micro_step,
            rank=args.process_index,
        )
        mask_rows = num_spans * (args.k_max - 1) if args.static_shape else None
        layout = build_layout(prefix, lengths, k, num_tokens=tokens.shape[1], mask_rows=mask_rows)
        index = torch.arange(tokens.shape[1])
        answer = (index >= prompts[:, None] - 1) & (index < lengths[:, None] - 1)
        return {"input_ids": tokens, "layout": layout, "prefix_rows": answer}

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Attach plans to the micro-batches of a step; count span and answer rows over all of them and all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        step = self.state.global_step
        k = draw_k(self.args.k_min, self.args.k_max, seed=self.args.seed, step=step)
        plans = [self.plan(batch, k=k, step=step, micro_step=i) for i, batch in enumerate(batches)]
        return plans, self._count(plans, device)

    def _count(self, plans: list[dict[str, Any]], device: torch.device) -> Tensor:
        """Planned span rows and answer rows [2] over the given micro-batches and all ranks."""
        rows = sum(int(plan["layout"].valid.sum()) for plan in plans)
        answers = sum(int(plan["prefix_rows"].sum()) for plan in plans)
        return self.accelerator.reduce(torch.tensor([rows, answers], dtype=torch.float32, device=device), "sum")

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One step under span attention, backward included: activation checkpointing runs the forward again there."""
        with self._span_attention(model, inputs) as inputs:
            return super().training_step(model, inputs, num_items_in_batch)

    @contextmanager
    def _span_attention(self, model: nn.Module, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        layout: Layout = inputs["layout"]
        context = SpanContext(layout.to(self.args.device))
        with attention_context(self.accelerator.unwrap_model(model), context):
            yield {**inputs, "layout": context}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the mean over the step's span rows, times the number of ranks (DDP averages)."""
        core = self.accelerator.unwrap_model(model)
        counts = torch.as_tensor(num_items_in_batch, device=self.args.device).clamp(min=1)
        weight = self.args.prefix_weight

        def forward(tokens: Tensor, context: SpanContext, prefix_rows: Tensor) -> MTPLoss:
            with self.accelerator.autocast():
                return mtp_loss(
                    core,
                    self.teacher,
                    tokens,
                    context,
                    mask_token_id=self.mask_token_id,
                    eos_token_ids=self.eos_token_ids,
                    target=self.args.teacher_target,  # type: ignore[arg-type]
                    prefix_rows=prefix_rows if weight else None,
                )

        with _forward_as(core, forward):
            sums: MTPLoss = model(inputs["input_ids"], inputs["layout"], inputs["prefix_rows"])
        loss = (sums.span / counts[0] + weight * sums.prefix / counts[1]) * self.accelerator.num_processes
        # Kept for the next log; the graph must not live that long.
        self._sums.append(replace(sums, span=sums.span.detach(), prefix=sums.prefix.detach()))
        return (loss, sums) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The loss of a batch at k = k_max on spans of a fixed draw; no logits are gathered."""
        planned = self.plan(inputs, k=self.args.k_max, step=_EVALUATION_STEP, micro_step=0)
        counts = self._count([planned], self.args.device)
        with torch.no_grad(), self._span_attention(model, planned) as ready:
            ready = self._prepare_inputs(ready)
            loss = self.compute_loss(model, ready, num_items_in_batch=counts)
        return loss.detach(), None, None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer.evaluate, with the span statistics of the evaluation batches."""
        training_sums, self._sums = self._sums, []
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._sums = training_sums

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add agreement by position, agreeing-prefix length and confidence since the last log."""
        if self._sums:
            prefix = "eval_" if any(name.startswith("eval_") for name in logs) else ""
            for name, value in self._statistics().items():
                logs[prefix + name] = value
        super().log(logs, *args, **kwargs)

    def _statistics(self) -> dict[str, float]:
        """Means over the collected batches and all ranks; rows of different k are padded to k_max."""
        table = torch.zeros(4, self.args.k_max, device=self.args.device)
        for sums in self._sums:
            k = len(sums.rows)
            table[0, :k] += sums.agree.detach()
            table[1, :k] += sums.rows.detach()
            table[2, :k] += sums.confidence.detach()
            table[3, 0] += sums.agreeing_prefix.detach()
            table[3, 1] += sums.spans.detach()
        self._sums.clear()
        agree, rows, confidence, other = self.accelerator.reduce(table, "sum").tolist()
        logs = {"agreement": sum(agree) / max(1.0, sum(rows)), "agreeing_prefix": other[0] / max(1.0, other[1])}
        for j, n in enumerate(rows):
            if n:
                logs[f"agreement_{j + 1}"] = agree[j] / n
                logs[f"confidence_{j + 1}"] = confidence[j] / n
        return logs
