"""MTPTrainer for a gated adapter: the objective of mtpkern.train.gated, and checkpoints that are adapter folders."""

from __future__ import annotations

from mtpkern.train.extra import PeftConfig, PeftModel  # isort: split

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.trainer_utils import TrainOutput

from mtpkern.adapter import gate_of, record_row, save_adapter
from mtpkern.adapter_config import base_known_by, is_gated, is_quantised, row_of
from mtpkern.attention import AttentionContext, attention_context
from mtpkern.gate import Gate
from mtpkern.train.arguments import refuse
from mtpkern.train.captured import CapturedSteps
from mtpkern.train.config import MTPConfig
from mtpkern.train.evaluate import HeldOut
from mtpkern.train.gated import BehindPrefixContext, gated_loss
from mtpkern.train.layout import Layout, draw_within, tensors_of
from mtpkern.train.lora import adapter_to_train, adapters_asked, add_gated_lora, keeping, plain_model
from mtpkern.train.objective import MTPLoss, forward_as
from mtpkern.train.prefix import Packing, Prefixes, texts_of
from mtpkern.train.trainer import MTPTrainer

_BY_POSITION = ("agree", "rows", "confidence", "entropy")
_SUMS = tuple(f.name for f in fields(MTPLoss))


class GatedTrainer(MTPTrainer):
    """MTPTrainer of adapters that act on mask rows only; its arguments, with MTPConfig(gated=True, lora_rank=...).

    model   the plain base, or one with a gated adapter, which then goes on learning

    Checkpoints are adapter folders, and `save_model` writes one, in save_dtype: `mtpkern.load_adapter` reads them.
    Under FSDP2 base and adapters lie in shards, and only what `save_model` writes is such a folder.
    Texts should be the base's own greedy answers (`mtpkern generate`), since the default target is the text itself.

        trainer = GatedTrainer(model=base, args=MTPConfig("out", gated=True, lora_rank=16, k_max=8), train_dataset=data,
                               data_collator=MTPCollator(tokenizer.pad_token_id))
        trainer.train()
        trainer.save_model("adapter")
    """

    gated = True

    @keeping
    def __init__(self, model: PreTrainedModel | PeftModel, *, args: MTPConfig, **kwargs: Any) -> None:
        refuse(
            args.init_adapter and isinstance(model, PeftModel),
            f"init_adapter {args.init_adapter} is for a plain base, and the model has adapters already; leave "
            "init_adapter out, or give the base",
        )
        names = model.active_adapters if isinstance(model, PeftModel) else []
        others = [name for name in names if not is_gated(model.peft_config[name])]
        refuse(
            others,
            f"the model's adapter {', '.join(map(repr, others))} is not gated and would be trained, too, or instead; "
            "merge it into what is to be the base, model = model.merge_and_unload(), or take the base, model.unload()",
        )
        if isinstance(model, PeftModel):
            trained = {
                name: "lora_" in name or name == "mask_row" for name, x in model.named_parameters() if x.requires_grad
            }
            refuse(
                not trained or not all(trained.values()),
                "the adapter alone must be trained, its base stay as it is; of this model "
                f"{next((name for name, own in trained.items() if not own), 'nothing')} would be: load it anew, "
                "mtpkern.load_adapter(base, folder, is_trainable=True)",
            )
        super().__init__(model, args=args, **kwargs)
        brought = isinstance(model, PeftModel) or args.init_adapter  # a new one knows its base
        if brought and not is_quantised(self.plain) and not any(x.is_meta for x in self.plain.parameters()):
            known = base_known_by(self.plain)
            # A base that was trained since. One that is the same keeps the name it was known by, wherever it lies.
            if known["digest"] != self.gate.settings.digest:
                self.gate.record(**known)
        self.prefixes = Prefixes(
            int(args.prefix_memory * 2**30),
            states=args.needs_teacher,
            passes=self._most if self.is_fsdp_enabled else None,
        )
        self._steps: CapturedSteps | None = None
        if self.is_fsdp_enabled:
            # Of shards, peft's own state would leave out the mask token's row.
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")

    def _adapted(self, plain: PreTrainedModel, mask_token_id: int | None, args: MTPConfig) -> PeftModel:
        if args.init_adapter:
            return adapter_to_train(plain, args.init_adapter, rank=args.lora_rank, k_max=args.k_max)
        return add_gated_lora(plain, k_max=args.k_max, **adapters_asked(args))

    @property
    def gate(self) -> Gate:
        """The gate of the model in training."""
        return cast(Gate, gate_of(self.plain))

    def _most(self, n: int) -> int:
        """The largest n of all ranks."""
        return int(self.accelerator.gather(torch.tensor([n], device=self.args.device)).max())

    @staticmethod
    def _loss_rows(layout: Layout) -> Tensor:
        """The first row of a span is the base's own."""
        return layout.valid[..., 1:]

    def plan(self, batch: dict[str, Any], **draw: Any) -> dict[str, Any]:
        """As MTPTrainer's, and where the texts stand, with the digests by which they are known again."""
        if (steps := self._shaping(draw["step"])) is not None:
            tokens = batch["input_ids"]
            batch = {**batch, "input_ids": F.pad(tokens, (0, steps.tokens(tokens.shape[1]) - tokens.shape[1]))}
        planned = super().plan(batch, **draw)
        texts = texts_of(planned["layout"], planned["input_ids"].shape[1], batch.get("digests"))
        return {**planned, "prefixes": texts}

    def draw(self, among: Tensor, k: int, num_spans: int | Tensor, **options: Any) -> Tensor:  # type: ignore[override]
        """As MTPTrainer's, with spans that do not exist behind those that do where steps are graphs."""
        prefix = draw_within(among, k, num_spans, **options)
        steps = self._shaping(options["step"])
        return prefix if steps is None else F.pad(prefix, (0, steps.spans(prefix.shape[1]) - prefix.shape[1]))

    def _shaping(self, step: int) -> CapturedSteps | None:
        """The graphs for whose sake shapes are few; none of evaluation, whose steps are below 0."""
        return self._steps if self._steps is not None and not self._steps.refused and step >= 0 else None

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As MTPTrainer.train."""
        try:
            return super().train(*args, **kwargs)
        finally:
            # Graphs, and the memory that they hold.
            self._steps = None

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """As MTPTrainer's, padded to few shapes where steps are graphs."""
        if self.args.cuda_graph and self._steps is None and not self.is_fsdp_enabled:
            self._steps = CapturedSteps(cast(nn.Module, self.model))
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _forward_backward(self, model: nn.Module, inputs: dict[str, Any], counts: Tensor | int | None) -> Tensor:
        steps = self._steps
        if steps is None or steps.refused:
            return super()._forward_backward(model, inputs, counts)
        if not model.training:
            model.train()
        layout, tokens, texts = inputs["layout"], inputs["input_ids"], inputs["prefixes"]
        rows = steps.rows(len(texts), sum(len(text) for text in texts))
        packing = Packing.of(texts, tokens.shape[0], tokens.shape[1], rows)
        parts = {"layout": layout, "packing": packing}
        tensors = {f"{part}.{name}": x for part, value in parts.items() for name, x in tensors_of(value).items()}
        given = {"tokens": tokens, "counts": torch.as_tensor(counts), **tensors}
        core = self.accelerator.unwrap_model(model)
        target = self._objective().target

        def step(x: Mapping[str, Tensor]) -> Tensor:
            now = (
                replace(value, **{name: x[f"{part}.{name}"] for name in tensors_of(value)})
                for part, value in parts.items()
            )
            context = BehindPrefixContext(*now)
            with attention_context(self.plain, context), self.gate.open_for_training(), self._compiled():
                with self.accelerator.autocast():
                    sums = self._loss_sums(core, x["tokens"], context)
                loss = sums.span / x["counts"][0].clamp(min=1)
                loss.backward()
            return torch.cat([loss.detach()[None], *(getattr(sums, name).detach().view(-1) for name in _SUMS)])

        sizes = [layout.row.shape[-1] if name in _BY_POSITION else 1 for name in _SUMS]
        loss, *sums = steps(target, given, step).split([1, *sizes])
        self._sums.append(MTPLoss(**{n: x if n in _BY_POSITION else x.view(()) for n, x in zip(_SUMS, sums)}))
        return loss.view(())

    def _context(self, inputs: dict[str, Any]) -> AttentionContext:
        return BehindPrefixContext(inputs["layout"].to(self.args.device), inputs["prefixes"])

    @contextmanager
    def _span_attention(self, model: nn.Module, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with super()._span_attention(model, inputs) as inputs, self.gate.open_for_training():
            yield inputs
        if isinstance(head := self.plain.get_output_embeddings(), FSDPModule):
            head.reshard()

    def _loss_sums(self, core: nn.Module, tokens: Tensor, context: Any, **rows: Tensor) -> MTPLoss:
        self._take_row(core)
        # No module is called for the head, which would gather it; it stays whole until backward has come to it.
        if isinstance(head := plain_model(core).get_output_embeddings(), FSDPModule):
            head.unshard()
        return gated_loss(
            plain_model(core),
            tokens,
            context,
            self._objective(),
            prefixes=self.prefixes,
            kept=self._kept,
            random=self._random,
        )

    def _take_row(self, core: nn.Module) -> None:
        """Inside a call of a sharded model the mask token's row is another tensor, which has been gathered."""
        self.gate.row = cast(nn.Parameter, core.mask_row)

    def _decode_held_out(self, held_out: HeldOut) -> dict[str, float]:
        if not self.is_fsdp_enabled:
            return super()._decode_held_out(held_out)
        core = self.accelerator.unwrap_model(self.model)

        def decode() -> dict[str, float]:
            self._take_row(core)
            return super(GatedTrainer, self)._decode_held_out(held_out)

        # What lies around the layers belongs to the whole, and is gathered by a call of that.
        with forward_as(core, decode):
            return cast(dict[str, float], core())

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        record_row(self.accelerator.unwrap_model(self.model))
        super()._save(output_dir, state_dict=state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model=model)
        self._load_row(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_row(cast(str, self.state.best_model_checkpoint))

    def _load_row(self, folder: str) -> None:
        """The mask token's row, which peft does not know; FSDP's own files hold it."""
        if self.is_fsdp_enabled:
            return
        with torch.no_grad():
            self.gate.row.copy_(row_of(PeftConfig.from_pretrained(folder)))

    def _save_final(self, folder: Path, dtype: torch.dtype) -> None:
        """The adapter's folder; the resumable checkpoints inside training are float32."""
        if self.args.should_save or self.is_fsdp_enabled:
            core = cast(PeftModel, self.accelerator.unwrap_model(self.model))
            save_adapter(core, folder if self.args.should_save else None, dtype=dtype)
