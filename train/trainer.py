"""A thin transformers.Trainer for multi-token prediction: what a step trains, what is logged and evaluated.

Four rules hold it up (docs/log.md): backbone, readout, teacher pass and loss run inside one wrapped model call; the
head is read as a weight and never called as a module; k and spans are pure functions of (seed, step, micro-step,
rank), so that a resumed run equals an uninterrupted one; trained weights are float32. Checkpoints, resuming and what
is saved in the end are those of mtpkern.train.run. Logging and evaluation stand here, because they share a step's sums.

Source   arXiv 2602.06019, training details
"""

from __future__ import annotations

from mtpkern.train.extra import PeftModel, TorchDynamoPlugin, fsdp2_prepare_model  # isort: split

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput

from mtpkern.adapter import gate_of, wrapping
from mtpkern.attention import AttentionContext, attention_context, ended_by_interrupts
from mtpkern.model import (
    at_rest,
    learned_positions,
    random_in_training,
    record_settings,
    resolve_mask_token,
    suppress_mask_token,
)
from mtpkern.train.arguments import refuse
from mtpkern.train.checks import (
    are_at_hand,
    require_adapters,
    require_batches,
    require_counted,
    require_sound,
    require_tested_engine,
    require_trainable,
    warn_of_dropout,
    warn_of_taught,
)
from mtpkern.train.collator import MTPCollator, require_known
from mtpkern.train.compilation import CompiledLayers
from mtpkern.train.config import MTPConfig
from mtpkern.train.evaluate import HeldOut
from mtpkern.train.layout import Layout, draw_k, draw_within, send
from mtpkern.train.lora import adapters_asked, add_lora, keeping, plain_model
from mtpkern.train.metrics import Seen, span_statistics
from mtpkern.train.objective import MTPLoss, Objective, SpanContext, forward_as, mtp_loss, stop_tokens_of
from mtpkern.train.original import Original
from mtpkern.train.plan import planned
from mtpkern.train.run import RunTrainer
from mtpkern.train.spans import KeptSpans

logger = logging.getLogger(__name__)

# Evaluation draws its spans from a stream of their own, the same for every batch and every evaluation.
_EVALUATION_STEP = -1


class MTPTrainer(RunTrainer):
    """Trainer whose loss is `mtpkern.train.objective.mtp_loss`.

    model, teacher   the student with float32 weights; its frozen original, not needed for teacher_target "gt", and
                     not accepted with LoRA, whose teacher is the student without its adapters
    mask_token_id    of the student; read from its config unless given
    held_out         prompts to decode at every evaluation: accuracy, tokens per pass and effective k of each strategy
    origin           what else the run is made of, by name, such as where model and data come from: a checkpoint records
                     it, beside the options and the data's fingerprint, and goes on only with the same

    With held-out texts every evaluation also measures the damage of training, eval_original_agreement: the share of
    their answers' tokens that the model, decoding plainly (k = 1), predicts as the model did that the run started from
    (with LoRA its base). Not under FSDP.

    Batches come from `MTPCollator`. At the end a summary stands in output_dir; `save_model` writes a plain Hugging Face
    checkpoint, adapters merged, whose config records the mask token and k_max. Raises ValueError for a missing teacher
    or one of another vocabulary, trained weights below float32, arguments of Trainer that would have no effect here,
    and, when it trains, for data of which nothing would count; NotFiniteError, a RuntimeError, for a loss or weights
    that are not finite.

        trainer = MTPTrainer(model=model, teacher=teacher, args=MTPConfig("out", k_max=8), train_dataset=data,
                             data_collator=MTPCollator(tokenizer.pad_token_id), processing_class=tokenizer)
        trainer.train()
        trainer.save_model("out")
    """

    args: MTPConfig
    train_dataset: Any
    gated = False
    draw = staticmethod(draw_within)

    @keeping
    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        args: MTPConfig,
        teacher: PreTrainedModel | None = None,
        mask_token_id: int | None = None,
        held_out: HeldOut | None = None,
        origin: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        plain, gate = plain_model(model), gate_of(plain_model(model))
        adds = args.lora_rank > 0 and not isinstance(model, PeftModel)
        require_trainable(plain, args)
        if args.process_index == 0:
            warn_of_dropout(plain)
            if not self.gated:
                warn_of_taught(model)
        refuse(
            not self.gated == args.gated == (gate is not None or (adds and args.gated)),
            "GatedTrainer, gated=True and a gated adapter (add_gated_lora, or lora_rank on a plain model) go together; "
            f"got {type(self).__name__}, gated={args.gated}, a model with gate: {gate}",
        )
        require_sound(model, teacher, args)
        for name in ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics", "model_init"):
            says = f"{name} would have no effect: the loss is fixed and no logits are gathered; omit it"
            refuse(kwargs.get(name) is not None, says)
        if held_out is not None:
            says = "held-out prompts cannot be decoded with bidirectional=True; leave held_out= out"
            refuse(args.bidirectional, says)
            held_out.require_fit(plain)
        stops = stop_tokens_of(plain)
        refuse(not stops, "the model's config names no eos_token_id, behind which spans end; set it")
        if adds:  # last of all: who is refused has the model that he gave
            model = self._adapted(plain, mask_token_id, args)
        self.mask_token_id = resolve_mask_token(plain, mask_token_id)
        if not self.gated:
            record_settings(plain, mask_token_id=self.mask_token_id, bidirectional=args.bidirectional)
            suppress_mask_token(plain, self.mask_token_id)
        record_settings(plain, k_max=args.k_max)
        origin = {**(origin or {}), "mask_token_id": self.mask_token_id}
        super().__init__(model=model, args=args, origin=origin, **kwargs)
        require_tested_engine(self)
        # accelerate would compile the whole model, whose forward is another one in every step here.
        self.accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")
        if teacher is not None:
            teacher = teacher.requires_grad_(False).eval().to(args.device)
            if args.teacher_dtype is not None:
                teacher = teacher.to(getattr(torch, args.teacher_dtype))
            if self.is_fsdp_enabled:
                teacher = fsdp2_prepare_model(self.accelerator, teacher)
        # With LoRA the student without its adapters.
        self.teacher = plain if isinstance(model, PeftModel) else teacher
        # Our loss is divided by the rows of the whole accumulated batch already. Trainer is told so by the first name,
        # of transformers 5.17 by the second.
        self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = True
        self.eos_token_ids = torch.tensor(stops, device=args.device)
        self.held_out = held_out
        self._random = random_in_training(plain).values()
        self._positions = learned_positions(plain, needed=sys.maxsize)
        self._layers: CompiledLayers | None = None
        self._original: Original | None = None
        self._sums: list[MTPLoss] = []
        self._seen = Seen()
        rows = plain.get_input_embeddings().weight.shape[0]
        self._require_known = partial(require_known, rows=rows, mask_token_id=self.mask_token_id)
        self._unseen = True  # whether texts without an answer could come that nobody has told of
        self._kept: KeptSpans | None = None  # while an evaluation runs

    def _adapted(self, plain: PreTrainedModel, mask_token_id: int | None, args: MTPConfig) -> PeftModel:
        """The model with the adapters that the configuration asks for."""
        with wrapping(plain):
            model = add_lora(plain, resolve_mask_token(plain, mask_token_id), **adapters_asked(args))
            require_adapters(model, args)
        return model

    def plan(self, batch: dict[str, Any], **draw: int) -> dict[str, Any]:
        """The batch with its layout, of this rank: `mtpkern.train.plan.planned`, with k, step and micro_step."""
        input_ids, lengths = batch["input_ids"], torch.tensor(batch["lengths"])
        self._require_known(input_ids[torch.arange(input_ids.shape[1]) < lengths[:, None]])
        plan = planned(self.args, batch, **draw, draw=self.draw)
        if (most := self._positions) is not None:
            longest = min(max(batch["lengths"]), self.args.max_length or sys.maxsize)
            refuse(longest > most, f"a text has {longest} tokens, the model {most} positions: set max_length to {most}")
            # Masks further on predict what stands behind every text that the model could read, the padding.
            layout: Layout = plan["layout"]
            plan["layout"] = replace(layout, position=layout.position.clamp(max=most - 1))
        if self._unseen and not (plan["layout"].prefix > 0).view(plan["texts"], -1).any(1).all():
            self._unseen = False
            logger.warning("there are texts without a span: they have no answer behind the prompt, within max_length")
        return plan

    def draw_k(self, step: int) -> int:
        """k of a step on this rank."""
        args = self.args
        rank = args.process_index if args.k_scope == "rank" else None
        return draw_k(args.k_min, args.k_max, seed=args.seed, step=step, rank=rank)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Attach plans to the micro-batches of a step; count their rows over all of them and all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        step = self.state.global_step
        k = self.draw_k(step)
        plans = [self.plan(batch, k=k, step=step, micro_step=i) for i, batch in enumerate(batches)]
        return plans, self._count(plans, device)

    def _count(self, plans: list[dict[str, Any]], device: torch.device) -> Tensor:
        """Planned span, prefix and anchor rows [3] over the given micro-batches and all ranks."""
        rows = [(self._loss_rows(plan["layout"]), plan["prefix_rows"], plan["anchor_rows"]) for plan in plans]
        sums = [float(sum(int(x.sum()) for x in kind)) for kind in zip(*rows)] or [0.0] * 3
        counts = send(torch.tensor(sums, dtype=torch.float32), device)
        return self.accelerator.reduce(counts, "sum")

    @staticmethod
    def _loss_rows(layout: Layout) -> Tensor:
        """[B, M, K] bool: the predictions of a layout that may have a loss."""
        return layout.valid

    @ended_by_interrupts
    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One step under span attention, backward included: activation checkpointing runs the forward again there."""
        layout: Layout = inputs["layout"]
        self._seen.add(inputs["texts"], int(self._loss_rows(layout).sum()), int(layout.lengths.sum()))
        loss = self._forward_backward(model, inputs, num_items_in_batch)
        self._note_loss(loss)
        return loss

    def _forward_backward(self, model: nn.Module, inputs: dict[str, Any], counts: Tensor | int | None) -> Tensor:
        """The loss of a planned micro-batch, its gradients where the optimizer finds them."""
        with self._span_attention(model, inputs) as inputs, self._compiled():
            return super().training_step(model, inputs, counts)

    def _compiled(self) -> AbstractContextManager:
        """Decoder layers of student and teacher compiled inside it, where that is asked for."""
        args = self.args
        if not args.torch_compile:
            return nullcontext()
        if self._layers is None:
            teachers = [] if self.teacher is None or self.teacher is self.plain else [self.teacher]
            self._layers = CompiledLayers(
                self.plain,
                *teachers,
                backend=args.torch_compile_backend or "inductor",
                mode=args.torch_compile_mode,
                apart=self.gated,
                if_it_can=args.compiles_if_it_can,
            )
        return self._layers()

    @contextmanager
    def _span_attention(self, model: nn.Module, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        context = self._context(inputs)
        # Found on the host, which knows them: a device would have to be asked how many they are.
        rows = {
            name: send(inputs[name].flatten().nonzero().squeeze(1), self.args.device)
            for name in ("prefix_rows", "anchor_rows")
        }
        with attention_context(self.plain, context):
            yield {**inputs, "layout": context, **rows}

    def _context(self, inputs: dict[str, Any]) -> AttentionContext:
        """The attention of a plan."""
        return SpanContext(inputs["layout"].to(self.args.device))

    def _objective(self) -> Objective:
        """What the student learns now: in a warm-up the data's tokens. Evaluation has the same objective throughout."""
        warming_up = self.model.training and self.state.global_step < self.args.gt_warmup_steps
        target: Any = "gt" if warming_up else self.args.teacher_target
        return Objective(self.eos_token_ids, target, cast(Any, self.args.loss_support), self.args.eos_padding)

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

        def forward(tokens: Tensor, context: Any, **rows: Tensor) -> MTPLoss:
            with self.accelerator.autocast():
                return self._loss_sums(core, tokens, context, **rows)

        with forward_as(core, forward):
            rows = {name: inputs[name] for name in ("prefix_rows", "anchor_rows")}
            sums: MTPLoss = model(inputs["input_ids"], inputs["layout"], **rows)
        text = self.args.prefix_weight * sums.prefix / counts[1] + self.args.anchor_kl_weight * sums.anchor / counts[2]
        loss = (sums.span / counts[0] + text) * self.accelerator.num_processes
        # Kept for the next log; the graph must not live that long.
        self._sums.append(MTPLoss(**{name: x.detach() for name, x in vars(sums).items()}))
        return (loss, sums) if return_outputs else loss

    def _loss_sums(
        self, core: nn.Module, tokens: Tensor, context: Any, *, prefix_rows: Tensor, anchor_rows: Tensor
    ) -> MTPLoss:
        """The objective, inside the one wrapped call of the model."""
        return mtp_loss(
            plain_model(core),
            self.teacher,
            tokens,
            context,
            self._objective(),
            mask_token_id=self.mask_token_id,
            prefix_rows=prefix_rows if self.args.prefix_weight else None,
            anchor_rows=anchor_rows if self.args.anchor_kl_weight else None,
            as_teacher=partial(self._as_teacher, core) if isinstance(core, PeftModel) else None,
            kept=self._kept,
        )

    @contextmanager
    def _as_teacher(self, core: PeftModel) -> Iterator[None]:
        """The student without its adapters and, in the midst of its training, without what drops at random."""
        with core.disable_adapter(), at_rest(self._random):
            yield

    @ended_by_interrupts
    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The loss of a batch at k = k_max on spans of a fixed draw; no logits are gathered."""
        planned = self.plan(inputs, k=self.args.k_max, step=_EVALUATION_STEP, micro_step=0)
        counts = self._count([planned], self.args.device)
        with torch.no_grad(), self._span_attention(model, planned) as ready:
            loss = self.compute_loss(model, self._prepare_inputs(ready), num_items_in_batch=counts)
        return loss.detach(), None, None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer.evaluate, with the span statistics of the evaluation batches; training does not notice."""
        self._require_finite()
        outer = self._kept  # of several data sets each calls this inside it
        self._kept = kept = outer or KeptSpans()
        start, since = time.perf_counter(), self._seen.since
        try:
            with self._draws_apart(), self._sums_apart():
                metrics = super().evaluate(*args, **kwargs)
            if self.is_world_process_zero() and outer is None:
                kept.write(cast(str, self.args.output_dir), self.state.global_step)
            return metrics
        finally:
            self._kept = outer
            # Evaluation is no part of training's throughput.
            self._seen.since = since + time.perf_counter() - start

    def evaluation_loop(
        self, dataloader: DataLoader, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """As Trainer's, and the statistics of its spans, and the held-out prompts decoded.

        Among its metrics they are logged and choose the best.
        """
        require_batches(dataloader)
        with self._sums_apart():
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
            found = self._statistics()
        if self._original is not None:
            sums = self._original.agreement(self.plain, dataloader)
            agree, rows = self.accelerator.reduce(sums.float().to(self.args.device), "sum").tolist()
            if rows:
                found["original_agreement"] = agree / rows
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        if self.held_out is not None:
            output.metrics.update(self._decode_held_out(self.held_out))
        return output

    @contextmanager
    def _sums_apart(self) -> Iterator[None]:
        """A context whose batches are none of those of the next log."""
        before, self._sums = self._sums, []
        try:
            yield
        finally:
            self._sums = before

    def _statistics(self) -> dict[str, float]:
        """Agreement by position, agreeing prefix, confidence and entropy since these were asked for last."""
        if not self._sums:
            return {}
        reduce = partial(self.accelerator.reduce, reduction="sum")
        found = span_statistics(self._sums, k_max=self.args.k_max, device=self.args.device, reduce=reduce)
        self._sums.clear()
        return found

    def _require_data(self) -> None:
        """Raise ValueError for examples of which nothing counts, too, where they can be looked at."""
        super()._require_data()
        held_out = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        of_eval = {f"eval_dataset {name}".rstrip(): texts for name, texts in held_out.items()}
        sets = {"train_dataset": self.train_dataset, **of_eval}
        # Another collator may make examples of anything.
        at_hand = [name for name in sets if type(self.data_collator) is MTPCollator and are_at_hand(sets[name])]
        for name in at_hand:
            require_counted(name, sets[name], self.args, self._require_known)
        self._unseen = "train_dataset" not in at_hand

    def _note_start(self) -> None:
        """Note what the model predicts in one token a pass, for `eval_original_agreement`."""
        # Shards of FSDP are not there yet.
        if self._original is not None or self.eval_dataset is None or self.is_fsdp_enabled:
            return
        core = self.accelerator.unwrap_model(self.model)
        names: list[Any] = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else [None]
        # The mask token of a gated adapter is no row of the head, and on a text's own rows its adapters are off.
        adapted = isinstance(core, PeftModel) and not self.gated
        with self._draws_apart(), core.disable_adapter() if adapted else nullcontext():
            self._original = Original(
                self.plain,
                chain.from_iterable(self.get_eval_dataloader(name) for name in names),
                mask_token_id=None if self.gated else self.mask_token_id,
                max_length=self.args.max_length,
            )

    def _draws_apart(self) -> AbstractContextManager:
        """A context whose random draws leave those of training as they are."""
        return torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else [])

    def _decode_held_out(self, held_out: HeldOut) -> dict[str, float]:
        # Shards of FSDP are gathered in every pass, so that all ranks must make the same passes.
        alone = self.is_fsdp_enabled
        share = (0, 1) if alone else (self.args.process_index, self.args.world_size)
        try:
            sums = held_out.count(self.plain, *share)
        except Exception as error:
            # What has been trained is worth more than a figure that any checkpoint gives later.
            logger.warning("no accuracy, held-out prompts were not decoded: %s: %s", type(error).__name__, error)
            sums = torch.full((len(held_out.strategies), 6), torch.nan, dtype=torch.float32)
        if not alone:
            sums = self.accelerator.reduce(sums.float().to(self.args.device), "sum")
        return {f"eval_{name}": value for name, value in held_out.metrics(sums).items()}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the span statistics and the throughput since the last log of training."""
        self._require_finite()
        if found := self._statistics():
            logs |= {**found, **self._seen.rates()}
            self._seen = Seen()
        super().log(logs, *args, **kwargs)

    def _try_out(self) -> None:
        """Decode a held-out prompt before the first step, so that what is wrong with it shows at once."""
        # Shards of FSDP are not there yet.
        if self.held_out is not None and not self.is_fsdp_enabled:
            self.held_out.try_out(self.plain)
