"""A run: a Trainer that goes on exactly where it was, is alone in its folder, saves before it evaluates, and ends where
a number is not finite.

Nothing here knows of spans: `mtpkern.train.trainer.MTPTrainer` adds what is trained.
"""

from __future__ import annotations

from mtpkern.train.extra import PeftModel  # isort: split

import json
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import IntervalStrategy, TrainOutput

from mtpkern.model import record_settings
from mtpkern.train.config import MTPConfig
from mtpkern.train.disk import DiskFull, checkpoint_bytes, full_disk_named, require_space
from mtpkern.train.lock import alone_in
from mtpkern.train.lora import adapters_of, merged, plain_model
from mtpkern.train.record import Record, fingerprint, options_of, report_rates
from mtpkern.train.resume import (
    Endless,
    load_weights,
    mark_complete,
    newest_checkpoint,
    remove_checkpoint,
    renew,
    require_whole,
    rotate,
)
from mtpkern.train.saving import save_plain
from mtpkern.train.summary import summarise

logger = logging.getLogger(__name__)


class NotFiniteError(RuntimeError):
    """A loss or weights that are not numbers any more."""


class RunTrainer(Trainer):
    """Trainer whose runs are recorded, locked and resumed exactly; of its arguments `origin` is new, see MTPTrainer."""

    args: MTPConfig
    train_dataset: Any

    def __init__(self, *, origin: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.origin = origin
        # The record that a resumed run goes on from, what it changes, and whether it had come to its end.
        self._before: Record | None = None
        self._changed: dict[str, list[Any]] = {}
        self._ended = False
        self._recipe: dict[str, Any] = {}
        self._resumed_at = 0
        # The first step with a loss that is not finite.
        self._broken_step = torch.tensor(torch.inf, dtype=torch.float32, device=self.args.device)
        self._pushes = False  # while what is saved goes to the hub

    @property
    def plain(self) -> PreTrainedModel:
        """The transformers model in training, without what wraps it."""
        return plain_model(self.accelerator.unwrap_model(self.model))

    def _made_of(self) -> dict[str, Any]:
        """What makes this run what it is, as far as it is known here; `origin` adds the rest."""
        recipe = options_of(self.args, stream=isinstance(self.train_dataset, IterableDataset))
        if isinstance(self.model, PeftModel) and not self.args.lora_rank:
            recipe["adapters"] = adapters_of(self.model)
        return {**recipe, "train_dataset": fingerprint(self.train_dataset), **self.origin}

    def _note_start(self) -> None:
        """What is noted of the model that the run starts from, before a checkpoint's weights take its place."""

    def _try_out(self) -> None:
        """What is tried before the first step."""

    def _note_loss(self, loss: Tensor) -> None:
        """Note the first step with a loss that is not finite; on the device, so that no step waits for it."""
        first = self._broken_step.clamp(max=self.state.global_step)
        self._broken_step = torch.where(loss.isfinite(), self._broken_step, first)

    def _require_finite(self, *, weights: bool = False, alone: bool = False) -> None:
        """Raise NotFiniteError where the loss of any rank has not been finite; called by all ranks, before any save.

        weights   look at the trained weights too: a gradient can break in the very step that is to be saved
        alone     this rank may be the only one that calls
        """
        broken, what = self._broken_step, "loss"
        if weights and bool(broken.isinf()) and not self._weights_are_finite():
            broken, what = torch.full_like(broken, self.state.global_step - 1), "weights or loss"
        # Gathered, so that all ranks leave together.
        step = float(broken if alone else self.accelerator.gather(broken.reshape(1)).min())
        if step != float("inf"):
            raise NotFiniteError(
                f"the {what} of step {int(step) + 1} is not finite: expected a number; nothing has been saved since "
                "the last checkpoint. Lower learning_rate, lengthen warmup_steps, or compute in bf16 instead of fp16; "
                "a single bad batch shows with a different seed"
            )

    def _weights_are_finite(self) -> bool:
        trained = (p.detach() for p in self.model.parameters() if p.requires_grad)  # type: ignore[union-attr]
        # Of a sharded weight each rank looks at its own part.
        local = (p.to_local() if isinstance(p, DTensor) else p for p in trained)
        return bool(torch.stack([p.isfinite().all() for p in local]).all())

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: nn.Module, trial: Any, *rest: Any, **kwargs: Any
    ) -> None:
        """As Trainer's, but a step is saved before it is evaluated: what goes wrong there costs no training.

        Evaluation comes first only where it says what is saved (save_strategy "best") or sets the learning rate; then,
        and where the step was not to be saved, one that fails has it saved, but for several ranks: others would wait.
        """
        args, saves = self.args, self.control.should_save
        if args.logging_strategy == IntervalStrategy.STEPS and self.state.global_step >= self.state.max_steps:
            # Trainer saves and evaluates the last step; a run shorter than logging_steps would show nothing.
            self.control.should_log = True
        decides = args.save_strategy == "best" or args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
        saves_first = self.control.should_evaluate and saves and not decides
        if saves_first:
            self.control.should_evaluate = False
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *rest, **kwargs)
            self.control.should_evaluate = True
        evaluates = self.control.should_evaluate
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *rest, **kwargs)
        except (NotFiniteError, DiskFull):
            raise
        except Exception:
            if evaluates and not saves_first and args.save_strategy != "no" and args.world_size == 1:
                self._save_checkpoint(model, trial)
            raise
        if saves_first:
            self._note_evaluation(Path(self._get_output_dir(trial=trial)))

    def _note_evaluation(self, run: Path) -> None:
        """Put what an evaluation has found into the checkpoint of its step, the best from now on where it is."""
        state, folder = self.state, run / f"checkpoint-{self.state.global_step}"
        if state.best_global_step == state.global_step:
            state.best_model_checkpoint = str(folder)
        if not self.args.should_save:
            return
        for item in (*self.callback_handler.callbacks, self.control):
            name = type(item).__name__
            if isinstance(item, ExportableState) and not isinstance(state.stateful_callbacks.get(name), list):
                state.stateful_callbacks[name] = item.state()
        if not self.args.save_only_model:
            renew(folder, TRAINER_STATE_NAME, json.dumps(asdict(state), indent=2, sort_keys=True) + "\n")
        rotate(run, self.args.save_total_limit, state.best_model_checkpoint)

    @property
    def _is_whole(self) -> bool:
        """Whether checkpoints are those of a plain model, not of adapters or shards."""
        return isinstance(self.model, PreTrainedModel) and not self.is_fsdp_enabled

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """As Trainer's, which leaves weights as they are whose names in the files are others."""
        if self._is_whole and model is None:
            load_weights(cast(PreTrainedModel, self.model), resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model=model)

    def _load_best_model(self) -> None:
        """As Trainer's, in the same way."""
        if self._is_whole:
            load_weights(cast(PreTrainedModel, self.model), cast(str, self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def get_train_dataloader(self) -> DataLoader:
        """As Trainer's; a stream begins again where it ends."""
        if isinstance(self.train_dataset, IterableDataset) and not isinstance(self.train_dataset, Endless):
            self.train_dataset = Endless(self.train_dataset)
        return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """As Trainer's; sorting by length draws from the global state, which a run resumed in a later epoch has not."""
        sampler = super()._get_train_sampler(train_dataset)

        def set_epoch(epoch: int) -> None:
            if epoch > 0:
                sampler.generator = torch.Generator().manual_seed(cast(int, self.args.data_seed) + epoch)

        if isinstance(sampler, LengthGroupedSampler):
            sampler.set_epoch = set_epoch
        return sampler

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As Trainer.train; True resumes the newest complete checkpoint of output_dir.

        A resumed run that had ended, and is asked for no more steps than before, trains and writes nothing; the model
        is then that of its checkpoint. Raises ValueError where there is no checkpoint, where the given one was left
        half-written, where it is of a run with other settings than `args.allow_changes` names, and where another
        process writes to output_dir; DiskFull where not even two checkpoints fit.
        """
        output_dir = cast(str, self.args.output_dir)
        with alone_in(output_dir) if self.is_world_process_zero() else nullcontext():
            newest = resume_from_checkpoint is True
            if newest:
                resume_from_checkpoint = newest_checkpoint(output_dir)
                if resume_from_checkpoint is None:
                    raise ValueError(f"no complete checkpoint in {output_dir}: start without resuming")
            self._recipe, self._before, self._changed, self._ended = self._made_of(), None, {}, False
            if isinstance(resume_from_checkpoint, (str, Path)):
                resume_from_checkpoint = str(resume_from_checkpoint)
                self._go_on_from(resume_from_checkpoint, newest)
            if not self._ended:
                self._require_data()
            self._note_start()
            # What is saved meanwhile says so.
            record_settings(self.plain, finished=False)
            if self._ended:
                # Those that draw a bar or write to a tracker, too, would begin.
                handler = self.callback_handler
                callbacks, handler.callbacks = handler.callbacks, []
                try:
                    result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
                finally:
                    handler.callbacks = callbacks
            else:
                result = self._train(resume_from_checkpoint, **kwargs)
            record_settings(self.plain, finished=True)
        return result

    def _train(self, checkpoint: str | bool | None, **kwargs: Any) -> TrainOutput:
        self._try_out()
        output_dir = cast(str, self.args.output_dir)
        if self.is_world_process_zero():
            require_space(output_dir, cast(nn.Module, self.model), self.args)
        result = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        if self.is_world_process_zero():
            self.record().write(output_dir)
            try:
                summarise(self.state.log_history, output_dir)
            except OSError as error:
                # What comes next, the final model, is worth more.
                logger.warning("no summary in %s: %s", output_dir, error)
        return result

    def _require_data(self) -> None:
        """Raise ValueError for data of which no batch is left: Trainer would read nothing of them, and end well."""
        args, held_out = self.args, self.eval_dataset if self.args.eval_strategy != "no" else None
        evaluated = held_out.values() if isinstance(held_out, dict) else [held_out]
        sets = [("train", self.train_dataset, args.train_batch_size)]
        sets += [("eval", texts, args.eval_batch_size) for texts in evaluated]
        for name, texts, batch in sets:
            batch *= args.world_size
            if args.dataloader_drop_last and hasattr(texts, "__len__") and len(texts) < batch:
                raise ValueError(
                    f"dataloader_drop_last leaves no batch of {len(texts)} texts: {batch} make one, on all processes "
                    f"together; lower per_device_{name}_batch_size, or leave dataloader_drop_last out"
                )

    def record(self, *, saved: bool = False) -> Record:
        """The run at this step, to be written into a folder: `trainer.record(saved=True).write("out")`."""
        before = self._before.changes if self._before else []
        changes = [*before, {"step": self._resumed_at, **self._changed}] if self._changed else before
        epochs = self.args.num_train_epochs if self.args.max_steps <= 0 else None
        return Record(self._recipe, self.state.global_step, self.state.max_steps, epochs, changes, saved)

    def _go_on_from(self, checkpoint: str, newest: bool) -> None:
        """Compare a checkpoint's record with this run, and see whether it had come to the end that is asked for."""
        require_whole(checkpoint)
        self._resumed_at = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).global_step
        last = self._resumed_at
        if newest:
            # A run that a callback has stopped ended earlier than was asked for.
            end = Record.read(cast(str, self.args.output_dir))
            last = max(last, end.max_steps if end else 0)
        wanted = self.args.max_steps
        if wanted <= 0:
            wanted = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        self._ended = wanted <= last
        self._before = Record.read(checkpoint)
        if self._before is None:
            logger.warning("%s records no settings: nobody can see whether they are the same", checkpoint)
            return
        self._changed = self._before.require_same(self._recipe, self.args.allow_changes, checkpoint)
        self._before.report_versions()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's, which looks for the end only behind a step: one that had ended would train another."""
        if self._ended:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """As Trainer's, which would log, evaluate and save as often as the checkpoint says, whatever is asked for."""
        result = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        if self._before is not None and not self._ended and self._before.max_steps != max_steps:
            report_rates(self.args, self._before.max_steps, max_steps, self.state.global_step)
        return result

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As Trainer's; rates, decay and the like are those of now, which Trainer would take from the checkpoint."""
        optimizer, schedule = self.optimizer, self.lr_scheduler
        assert optimizer is not None
        groups = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
        bases = list(getattr(schedule, "base_lrs", ()))
        super()._load_optimizer_and_scheduler(checkpoint)
        if not isinstance(schedule, LambdaLR):
            if "learning_rate" in self._changed:
                raise ValueError(
                    f"learning_rate cannot change under lr_scheduler_type {self.args.lr_scheduler_type!s}, which goes "
                    "on from the rate that it has reached; leave it as it was"
                )
            return
        schedule.base_lrs = bases
        for group, kept, base, rate in zip(optimizer.param_groups, groups, bases, schedule.lr_lambdas):
            group.update(kept, lr=base * rate(schedule.last_epoch))
        schedule._last_lr = [group["lr"] for group in optimizer.param_groups]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Trainer's, but the last whole one is always findable; DiskFull leaves no half-written one behind."""
        self._require_finite(weights=True)
        record_settings(self.plain, finished=self.state.global_step >= self.state.max_steps)
        args, run = self.args, Path(self._get_output_dir(trial=trial))
        folder = run / f"checkpoint-{self.state.global_step}"
        if args.should_save and folder.exists():
            remove_checkpoint(folder)
        self.accelerator.wait_for_everyone()
        # Trainer would delete older checkpoints before this one counts.
        limit, args.save_total_limit = args.save_total_limit, None
        try:
            with full_disk_named(run, checkpoint_bytes(cast(nn.Module, self.model), args)):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if args.should_save:
                    self.record().write(folder)
                    if not args.save_only_model:
                        mark_complete(folder)
        except DiskFull:
            if args.should_save:
                remove_checkpoint(folder)
            raise
        finally:
            args.save_total_limit = limit
        if args.should_save:
            rotate(run, limit, self.state.best_model_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write, in save_dtype, a plain checkpoint, adapters merged, or the folder of a gated adapter.

        Those inside training are float32 or adapters.
        """
        if _internal_call and not self._pushes:
            # FSDP's own files, which come next, hold all weights: no second copy of them.
            if not self.is_fsdp_enabled:
                super().save_model(output_dir, _internal_call=True)
            return
        self._require_finite(weights=True, alone=not self.is_fsdp_enabled)
        self._save_final(Path(output_dir or str(self.args.output_dir)), getattr(torch, self.args.save_dtype))

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, which would push what a run is resumed from: here it is what save_model writes."""
        self._pushes = True
        try:
            return super().push_to_hub(*args, **kwargs)
        finally:
            self._pushes = False

    def _save_final(self, folder: Path, dtype: torch.dtype) -> None:
        """Called by all ranks, of which one writes: shards are gathered by all together."""
        core = self.accelerator.unwrap_model(self.model)
        state: dict[str, Any] = {}
        if self.is_fsdp_enabled:
            # Gathered on rank 0, one after the other.
            whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state = get_model_state_dict(self.model, options=whole)
        if self.args.should_save:
            plain = merged(core) if isinstance(core, PeftModel) else core
            save_plain(plain, folder, dtype, state=state, processing_class=self.processing_class)
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                # Pushes on the way have put them there, and from_pretrained would look at nothing else.
                (folder / name).unlink(missing_ok=True)
