"""A thin transformers.Trainer for multi-token prediction: resume, logging, evaluation and saving come with it.

Four rules hold it up (docs/log.md): backbone, readout, teacher pass and loss run inside one wrapped model call; the
head is read as a weight and never called as a module; k and spans are pure functions of (seed, step, micro-step,
rank), so that a resumed run equals an uninterrupted one; trained weights are float32.

Source   arXiv 2602.06019, training details
"""

from __future__ import annotations

# First, because transformers would not name what is missing.
from mtpkern.train.extra import DynamoBackend, PeftModel, TorchDynamoPlugin, fsdp2_prepare_model  # isort: split

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig, LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from mtpkern.attention import attention_context
from mtpkern.model import record_settings, resolve_mask_token
from mtpkern.train.compilation import CUDA_GRAPH_MODES, CompiledLayers
from mtpkern.train.evaluate import HeldOut, figures, summarise
from mtpkern.train.layout import (
    Counting,
    Layout,
    answer_ends,
    build_layout,
    draw_k,
    draw_within,
    pack,
    send,
    tokens_apart,
)
from mtpkern.train.lora import add_lora, merged, plain_model
from mtpkern.train.objective import MTPLoss, SpanContext, forward_as, mtp_loss
from mtpkern.train.resume import Endless, mark_complete, newest_checkpoint, remove_checkpoint, require_whole, rotate

# Evaluation draws its spans from a stream of their own, the same for every batch and every evaluation.
_EVALUATION_STEP = -1
DTYPES = ("float32", "bfloat16", "float16")


class NotFiniteError(RuntimeError):
    """A loss or weights that are not numbers any more."""


@dataclass
class MTPConfig(TrainingArguments):
    """TrainingArguments and what multi-token prediction adds.

    Defaults of the method are the paper's but for two that suit other data: its sequences count masks into their
    length (layout="paper") and its spans may stand in the prompt (response_only=False). What its authors' own runs add
    to its text (k and offset for each rank) stands in the shipped configurations, as the optimizer's settings do. A
    constant k ("static k" in the paper's ablation) is k_min = k_max. The loss is the mean over all planned span rows of
    a step: a row that is dropped (behind an EOS, or behind a miss under "until_fail") adds nothing, but counts.

    Raises ValueError, with the remedy, for values that contradict one another and for what nobody has tested:
    DeepSpeed, tensor and context parallelism, FSDP1.

        MTPConfig("out", k_max=16, teacher_target="hard", gt_warmup_steps=500, bf16=True, max_steps=2000)
    """

    k_min: int = field(default=2, metadata={"help": "Smallest number of predictions of a span."})
    k_max: int = field(default=16, metadata={"help": "Largest; k is drawn anew each step, uniform on k_min..k_max."})
    k_scope: str = field(default="step", metadata={"help": "Who shares a k: all ranks of a 'step', or each 'rank'."})
    num_spans: int | None = field(
        default=None,
        metadata={"help": "Spans a sequence; unless given the paper's N // (2 * k_max), N // k_max where 'random'."},
    )
    spacing: str = field(
        default="stride",
        metadata={"help": "'stride' (one in every N / num_spans rows; what falls on a prompt is none), or 'random'."},
    )
    span_offset: int | None = field(
        default=None, metadata={"help": "Offset in tokens of the first span of a stride; drawn anew unless given."}
    )
    offset_scope: str = field(
        default="sequence",
        metadata={
            "help": "Who shares a drawn offset: a 'sequence' has its own, or all of a 'rank' in a step have one."
        },
    )
    layout: str = field(
        default="default", metadata={"help": "max_length counts the text's tokens, or with 'paper' the masks too."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Longer texts are cut off; None cuts none."})
    response_only: bool = field(
        default=True, metadata={"help": "Spans in answers only, in those of every turn; else anywhere in the text."}
    )
    eos_padding: bool = field(
        default=True, metadata={"help": "Predictions behind the text's EOS count, with EOS as the data's token."}
    )
    teacher_target: str = field(default="hard", metadata={"help": "'hard', 'soft', or 'gt' (no teacher pass)."})
    gt_warmup_steps: int = field(
        default=0, metadata={"help": "First steps that learn the data's tokens, without a teacher pass."}
    )
    loss_support: str = field(
        default="all", metadata={"help": "'all' rows of a span, or 'until_fail': to the first that misses its target."}
    )
    prefix_weight: float = field(
        default=0.0, metadata={"help": "Weight of a next-token loss on the data's tokens, in the rows of prefix_scope."}
    )
    prefix_scope: str = field(
        default="answer", metadata={"help": "Tokens of the next-token loss: the 'answer', or 'all', the prompt's too."}
    )
    anchor_kl_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the teacher's KL on the answer's rows; keeps plain decoding as it was."},
    )
    static_shape: bool = field(default=False, metadata={"help": "Reserve mask rows for k_max at every k."})
    packing: bool = field(
        default=False, metadata={"help": "A micro-batch is one row without padding; for GPUs, whose kernel skips."}
    )
    bidirectional: bool = field(
        default=False,
        metadata={"help": "Masks of a span see one another both ways: an ablation that mtpkern.generate refuses."},
    )
    lora_rank: int = field(default=0, metadata={"help": "Rank of LoRA adapters; 0 trains all parameters."})
    lora_alpha: float | None = field(default=None, metadata={"help": "LoRA's scale; twice the rank unless given."})
    lora_targets: str = field(
        default="all-linear", metadata={"help": "Modules with adapters, separated by commas, or 'all-linear'."}
    )
    student_dtype: str = field(
        default="float32", metadata={"help": "Of the loaded student; bfloat16 only for weights that LoRA freezes."}
    )
    pure_bf16: bool = field(
        default=False,
        metadata={
            "help": "Train bfloat16 weights without float32 ones beside them: at a low rate most of them freeze."
        },
    )
    teacher_dtype: str | None = field(default=None, metadata={"help": "The teacher is cast to it; as loaded if None."})
    save_dtype: str = field(default="float32", metadata={"help": "Of the final checkpoint that save_model writes."})
    data_seed: int | None = field(default=None, metadata={"help": "Of the data's order; seed unless given."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "DDP's search for weights without a gradient; every step here uses all."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Columns are the collator's business."})
    torch_compile: bool = field(
        default=False, metadata={"help": "Compile the decoder layers of student and teacher, for training steps alone."}
    )
    torch_compile_backend: str | None = field(
        default=None, metadata={"help": "Sets torch_compile; 'inductor' unless given."}
    )
    torch_compile_mode: str | None = field(
        default=None, metadata={"help": "Sets torch_compile; modes that make CUDA graphs are refused."}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "A loss that is not finite is an error."})

    def __post_init__(self) -> None:
        if self.deepspeed:
            # Before transformers asks for its package.
            raise ValueError("DeepSpeed, ZeRO-3 included, is untested here and refused; use FSDP2 (fsdp=True) or DDP")
        # The parents must not see it: TrainingArguments would switch TF32 on, which rounds rotary positions too.
        compiler = self.torch_compile, self.torch_compile_backend, self.torch_compile_mode
        self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = False, None, None
        super().__post_init__()
        _, self.torch_compile_backend, self.torch_compile_mode = compiler
        self.torch_compile = any(compiler)
        if self.data_seed is None:
            # Else the order of the data hangs on whatever has been seeded last, and a resumed run may see another.
            self.data_seed = self.seed
        if not 1 <= self.k_min <= self.k_max:
            raise ValueError(f"1 <= k_min <= k_max must hold; got k_min={self.k_min}, k_max={self.k_max}")
        for name, allowed in (
            ("teacher_target", ("hard", "soft", "gt")),
            ("loss_support", ("all", "until_fail")),
            ("spacing", ("stride", "random")),
            ("layout", ("default", "paper")),
            ("k_scope", ("step", "rank")),
            ("offset_scope", ("sequence", "rank")),
            ("prefix_scope", ("answer", "all")),
            ("student_dtype", DTYPES),
            ("teacher_dtype", (None, *DTYPES)),
            ("save_dtype", DTYPES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}; got {getattr(self, name)!r}")
        for name in ("gt_warmup_steps", "lora_rank", "prefix_weight", "anchor_kl_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0; got {getattr(self, name)}")
        if self.num_spans is not None and self.num_spans < 1:
            raise ValueError(f"num_spans must be at least 1, or None for a number by max_length; got {self.num_spans}")
        if self.span_offset is not None and (self.span_offset < 0 or self.spacing != "stride"):
            raise ValueError(f"span_offset must be at least 0 and needs spacing='stride'; got {self.span_offset}")
        if self.offset_scope != "sequence" and (self.span_offset is not None or self.spacing != "stride"):
            raise ValueError("offset_scope is of drawn offsets: it needs spacing='stride' and no span_offset")
        if self.prefix_scope != "answer" and not self.prefix_weight:
            raise ValueError("prefix_scope is of the prefix loss; give prefix_weight, or leave prefix_scope out")
        self._require_room()
        for name, unset in (("lora_alpha", None), ("lora_targets", "all-linear")):
            if not self.lora_rank and getattr(self, name) != unset:
                raise ValueError(f"{name} needs lora_rank > 0; got {getattr(self, name)!r} and rank 0")
        if self.teacher_dtype is not None and (self.lora_rank or not self.needs_teacher):
            raise ValueError(
                "teacher_dtype is of a second model; with LoRA the teacher is the student without its adapters, and "
                "teacher_target 'gt' without an anchor needs none: leave teacher_dtype out"
            )
        if self.pure_bf16:
            self._accept_pure_bf16()
        elif self.lora_rank == 0 and self.student_dtype != "float32":
            raise ValueError(
                f"student_dtype {self.student_dtype!r} needs lora_rank > 0: trained weights are float32; set bf16=True "
                "to compute in bfloat16, or pure_bf16=True to train bfloat16 weights all the same"
            )
        if self.packing and self.static_shape:
            raise ValueError("packing leaves out all padding, static_shape adds it; set one of them")
        self._refuse_untested()

    @property
    def needs_teacher(self) -> bool:
        """Whether any part of the loss asks a teacher: the spans' target, or the anchor."""
        return self.teacher_target != "gt" or self.anchor_kl_weight > 0

    def spans_of(self, num_tokens: int) -> int:
        """How many spans a text padded to `num_tokens` gets, where they exist: `MTPConfig("out").spans_of(512) == 16`.

        Random positions get twice the paper's share, which paid in the ablation (docs/log.md), unless the masks count
        into the length.
        """
        if self.num_spans is not None:
            return self.num_spans
        period = self.k_max if self.spacing == "random" and self.layout == "default" else 2 * self.k_max
        return max(1, num_tokens // period)

    def _require_room(self) -> None:
        """Raise ValueError for a max_length that leaves fewer than two tokens of a text."""
        if self.max_length is None:
            if self.layout == "paper":
                raise ValueError("layout='paper' counts masks into max_length; give max_length (the paper: 160)")
            return
        masks = self.spans_of(self.max_length) * (self.k_max - 1)
        least = 2 + (masks if self.layout == "paper" else 0)
        if self.max_length < least:
            counted = f" and all {masks} masks of the spans (layout='paper')" if self.layout == "paper" else ""
            raise ValueError(
                f"max_length must be at least {least}, for two tokens{counted}; got {self.max_length}: raise it"
                + (", or lower num_spans or k_max" if counted else "")
            )

    def _accept_pure_bf16(self) -> None:
        """The student is bfloat16, its trained weights too; say what that costs. ValueError with other precisions."""
        others = {"lora_rank": self.lora_rank, "bf16": self.bf16, "fp16": self.fp16}
        given = [name for name, value in others.items() if value]
        if given or self.student_dtype == "float16":
            raise ValueError(
                f"pure_bf16 trains all weights in bfloat16; leave out {', '.join(given) or 'student_dtype float16'}, "
                "or pure_bf16"
            )
        self.student_dtype = "bfloat16"
        warnings.warn(
            "pure_bf16: bfloat16 keeps 8 bits of a weight and AdamW's steps are as large as the learning rate, so that "
            "at 1e-5 98 % of a small model's never moved in 300 steps (docs/log.md); learning_rate here is "
            f"{self.learning_rate:g}. bf16=True computes in bfloat16 beside float32 weights, a much hotter run at that",
            stacklevel=2,
        )

    def _refuse_untested(self) -> None:
        """What TrainingArguments offer and this trainer would do wrong or ignore."""
        parallel = self.parallelism_config
        for name in ("tp", "cp", "sp"):
            if parallel is not None and getattr(parallel, f"{name}_size", 1) > 1:
                raise ValueError(
                    f"{name}_size > 1 in parallelism_config is untested here and refused; use FSDP2 or DDP"
                )
        if self.fsdp and int((self.fsdp_config or {}).get("version", 2)) != 2:
            raise ValueError("FSDP version 1 is untested here and refused; set fsdp_config={'version': 2}")
        if self.torch_compile_mode in CUDA_GRAPH_MODES:
            raise ValueError(
                f"torch_compile_mode {self.torch_compile_mode!r} makes CUDA graphs, one for each of the many shapes of "
                "a step, and is refused; use 'default' or 'max-autotune-no-cudagraphs'"
            )
        if self.use_liger_kernel:
            raise ValueError("use_liger_kernel rewrites a forward that training here does not call; omit it")
        if self.neftune_noise_alpha is not None:
            raise ValueError("neftune_noise_alpha is untested here, and LoRA's teacher would see the noise; omit it")
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor has no meaning for self-distillation; set it to 0")
        if not self.average_tokens_across_devices:
            raise ValueError("average_tokens_across_devices=False would weigh rows by rank; leave it True")
        accelerator = cast(AcceleratorConfig, self.accelerator_config)
        if accelerator.dispatch_batches or accelerator.split_batches:
            raise ValueError("dispatch_batches and split_batches are refused: each rank reads its own batches")
        # None would mean True for streamed data.
        accelerator.dispatch_batches = False
        # Else the host waits at every batch until the device has finished the step before.
        accelerator.non_blocking = self.dataloader_pin_memory


class MTPCollator:
    """Right-pads {"input_ids": list, "prompt_length": int} to the longest text of the batch, or to a fixed length.

    The answer is what stands behind the prompt; in a conversation "earlier_answers", a list of (start, end) in tokens,
    names further ones inside it.
    """

    def __init__(self, pad_token_id: int, pad_to: int | None = None) -> None:
        self.pad_token_id = pad_token_id
        self.pad_to = pad_to

    def __call__(self, batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """input_ids [B, N] int64; lengths, prompt_lengths and earlier_answers as lists. ValueError for a longer text.

        Lists stay on the host, where spans are drawn: reading tensors back from a GPU would wait for it.
        """
        lengths = [len(x["input_ids"]) for x in batch]
        longest = max(lengths)
        if self.pad_to is not None and longest > self.pad_to:
            raise ValueError(f"texts must have at most pad_to = {self.pad_to} tokens; got {longest}: cut or raise it")
        input_ids = torch.full((len(batch), self.pad_to or longest), self.pad_token_id)
        for i, x in enumerate(batch):
            input_ids[i, : len(x["input_ids"])] = torch.tensor(x["input_ids"])
        return {
            "input_ids": input_ids,
            "lengths": lengths,
            "prompt_lengths": [int(x["prompt_length"]) for x in batch],
            "earlier_answers": [list(x.get("earlier_answers", ())) for x in batch],
        }


def _cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating-point tensors in another dtype; entries that share memory (tied embeddings) go on sharing it."""
    cast_tensors: dict[int, Tensor] = {}
    result = {}
    for name, x in state.items():
        if x.is_floating_point():
            x = cast_tensors.setdefault(x.data_ptr(), x.to(dtype))
        result[name] = x
    return result


def _rows_before(end: Tensor) -> Tensor:
    """[B, N] bool: the rows that predict the tokens of `answer_ends`, each the row before its token."""
    return torch.cat([end[:, 1:] > 0, end.new_zeros(len(end), 1, dtype=torch.bool)], dim=1)


class _Seen:
    """What a rank has trained on since the last log, and since when."""

    def __init__(self) -> None:
        self.rows = self.tokens = 0
        self.since = time.perf_counter()

    def add(self, rows: int, tokens: int) -> None:
        self.rows += rows
        self.tokens += tokens

    def rates(self) -> dict[str, float]:
        """Span rows and tokens a second on this rank and, on a GPU, the peak of memory in GiB."""
        seconds = time.perf_counter() - self.since
        rates = {"rows_per_second": self.rows / seconds, "tokens_per_second": self.tokens / seconds}
        if torch.cuda.is_available():
            rates["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return rates


class MTPTrainer(Trainer):
    """Trainer whose loss is `mtpkern.train.objective.mtp_loss`.

    model, teacher   the student with float32 weights; its frozen original, not needed for teacher_target "gt", and
                     not accepted with LoRA, whose teacher is the student without its adapters
    mask_token_id    of the student; read from its config unless given
    held_out         prompts to decode at every evaluation: accuracy, tokens per pass and effective k

    Batches come from `MTPCollator`. At the end of training a summary with the curves of agreement by position stands
    in output_dir. `save_model` writes a plain Hugging Face checkpoint, adapters merged, whose config
    records the mask token and k_max. Raises ValueError for a missing teacher, a teacher of another vocabulary, trained
    weights below float32, and for arguments of Trainer that would have no effect here; NotFiniteError, a
    RuntimeError, for a loss or weights that are not finite.

        trainer = MTPTrainer(model=model, teacher=teacher, args=MTPConfig("out", k_max=8), train_dataset=data,
                             data_collator=MTPCollator(tokenizer.pad_token_id), processing_class=tokenizer)
        trainer.train()
        trainer.save_model("out")
    """

    args: MTPConfig
    train_dataset: Any

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        args: MTPConfig,
        teacher: PreTrainedModel | None = None,
        mask_token_id: int | None = None,
        held_out: HeldOut | None = None,
        **kwargs: Any,
    ) -> None:
        plain = plain_model(model)
        self.mask_token_id = resolve_mask_token(plain, mask_token_id)
        if args.lora_rank and not isinstance(model, PeftModel):
            model = add_lora(
                plain,
                self.mask_token_id,
                rank=args.lora_rank,
                alpha=args.lora_alpha,
                targets=args.lora_targets,
                seed=args.seed,
            )
        self._require_sound(model, teacher, args)
        for name in ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics", "model_init"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} would have no effect: the loss is fixed and no logits are gathered; omit it")
        if args.bidirectional and held_out is not None:
            raise ValueError("held-out prompts cannot be decoded with bidirectional=True; leave held_out= out")
        record_settings(plain, mask_token_id=self.mask_token_id, k_max=args.k_max, bidirectional=args.bidirectional)
        super().__init__(model=model, args=args, **kwargs)
        self._require_tested_engine()
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
        # Our loss is divided by the rows of the whole accumulated batch already.
        self.loss_is_scaled_for_ga = True
        eos = plain.generation_config.eos_token_id if plain.generation_config else None
        eos = plain.config.eos_token_id if eos is None else eos
        if eos is None:
            raise ValueError("the model's config names no eos_token_id, behind which spans end; set it")
        self.eos_token_ids = torch.tensor([eos] if isinstance(eos, int) else list(eos), device=args.device)
        self.held_out = held_out
        self._layers: CompiledLayers | None = None
        self._sums: list[MTPLoss] = []
        self._seen = _Seen()
        # The first step with a loss that is not finite; on the device, so that no step waits for it.
        self._broken_step = torch.tensor(torch.inf, device=args.device)

    @staticmethod
    def _require_sound(model: nn.Module, teacher: PreTrainedModel | None, args: MTPConfig) -> None:
        """Raise ValueError for a student and a teacher that do not fit together or the configuration."""
        adapted = isinstance(model, PeftModel)
        if adapted and teacher is not None:
            raise ValueError("with LoRA the teacher is the student without its adapters: leave teacher= out")
        if teacher is None and not adapted and args.needs_teacher:
            part = "anchor_kl_weight" if args.teacher_target == "gt" else f"teacher_target {args.teacher_target!r}"
            raise ValueError(f"{part} needs teacher=, the frozen original model")
        trained = {p.dtype for p in model.parameters() if p.requires_grad}
        if args.pure_bf16 and trained != {torch.bfloat16}:
            raise ValueError(f"pure_bf16 trains bfloat16 weights; got {trained}: load with dtype=torch.bfloat16")
        if not args.pure_bf16 and trained - {torch.float32, torch.float64}:
            raise ValueError(
                f"trained weights must be float32; got {trained}: load with dtype=torch.float32, bf16=True"
            )
        frozen = {p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point()}
        if adapted and frozen - {getattr(torch, args.student_dtype)}:
            raise ValueError(
                f"the frozen weights are {', '.join(map(str, frozen))}, student_dtype is {args.student_dtype!r}: load "
                "the model in that dtype, or set student_dtype to its own"
            )
        if teacher is not None:
            ours, theirs = (m.get_output_embeddings().weight.shape[0] for m in (plain_model(model), teacher))
            # add_mask_token may have given the student rows that the teacher lacks; the banned mask token is one.
            if abs(ours - theirs) > 1:
                raise ValueError(
                    f"student and teacher must share a vocabulary; got {ours} and {theirs} rows: load both from one "
                    "checkpoint, then add the mask token to the student"
                )

    def _require_tested_engine(self) -> None:
        """Raise ValueError for engines chosen from outside (accelerate launch, the number of GPUs) and untested."""
        if self.is_deepspeed_enabled:
            raise ValueError("DeepSpeed, ZeRO-3 included, is untested here and refused; use FSDP2 or DDP")
        if self.args.n_gpu > 1:
            raise ValueError("several GPUs in one process are refused; start one process a GPU: torchrun or accelerate")
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ValueError(
                "FSDP asked for, but accelerate has set up none (version 1, one process, or a CPU); omit it"
            )
        if self.is_fsdp_enabled and self.args.torch_compile:
            raise ValueError("torch_compile under FSDP is untested here and refused; use DDP, or leave it out")
        if self.is_fsdp_enabled and isinstance(self.model, PeftModel):
            raise ValueError(
                "LoRA under FSDP is refused: its head stays a shard, and saving cannot merge shards; use DDP"
            )
        if self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO and not self.args.torch_compile:
            raise ValueError("accelerate's dynamo_backend is refused; set it to 'no', and torch_compile=True here")
        if self.is_distributed_loading_by_transformers:
            raise ValueError("a model sharded by from_pretrained (tensor parallel) is refused; load it whole")

    def plan(self, batch: dict[str, Any], *, k: int, step: int, micro_step: int) -> dict[str, Any]:
        """The batch with its layout: a pure function of where its answers lie, the seed, the step and the rank."""
        args = self.args
        tokens = batch["input_ids"]
        lengths, prompts = (torch.as_tensor(batch[name], device="cpu") for name in ("lengths", "prompt_lengths"))
        limit = args.max_length or tokens.shape[1]
        num_spans = args.spans_of(limit)
        counting: Counting = "paper" if args.layout == "paper" else "tokens"
        apart = tokens_apart(limit, num_spans, k, counting=counting)
        if counting == "paper":
            limit -= num_spans * (k - 1)
        tokens = tokens[:, :limit]
        lengths = lengths.clamp(max=limit)
        end = answer_ends(lengths, prompts, batch["earlier_answers"], num_tokens=tokens.shape[1])
        whole = answer_ends(lengths, torch.zeros_like(lengths), (), num_tokens=tokens.shape[1])
        anchor_rows = _rows_before(end)
        prefix_rows = _rows_before(whole) if args.prefix_scope == "all" else anchor_rows
        if not args.response_only:
            end = whole
        prefix = draw_within(
            end > 0,
            k,
            num_spans,
            spacing=args.spacing,  # type: ignore[arg-type]
            apart=apart,
            offset=args.span_offset,
            offset_scope=args.offset_scope,
            seed=args.seed,
            step=step,
            micro_step=micro_step,
            rank=args.process_index,
        )
        mask_rows = num_spans * (args.k_max - 1 + args.bidirectional) if args.static_shape else None
        layout = build_layout(
            prefix,
            lengths,
            k,
            num_tokens=tokens.shape[1],
            end=end.gather(1, prefix),
            mask_rows=mask_rows,
            bidirectional=args.bidirectional,
        )
        if args.packing:
            layout, (tokens, prefix_rows, anchor_rows) = pack(layout, tokens, prefix_rows, anchor_rows)
        return {"input_ids": tokens, "layout": layout, "prefix_rows": prefix_rows, "anchor_rows": anchor_rows}

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
        rows = [(plan["layout"].valid, plan["prefix_rows"], plan["anchor_rows"]) for plan in plans]
        sums = [float(sum(int(x.sum()) for x in kind)) for kind in zip(*rows)] or [0.0] * 3
        counts = send(torch.tensor(sums), device)
        return self.accelerator.reduce(counts, "sum")

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One step under span attention, backward included: activation checkpointing runs the forward again there."""
        layout: Layout = inputs["layout"]
        self._seen.add(int(layout.valid.sum()), int(layout.lengths.sum()))
        with self._span_attention(model, inputs) as inputs, self._compiled():
            loss = super().training_step(model, inputs, num_items_in_batch)
        step = torch.full_like(self._broken_step, self.state.global_step)
        self._broken_step = torch.where(loss.isfinite(), self._broken_step, torch.minimum(step, self._broken_step))
        return loss

    def _compiled(self) -> AbstractContextManager:
        """Decoder layers of student and teacher compiled inside it, where that is asked for."""
        args = self.args
        if not args.torch_compile:
            return nullcontext()
        if self._layers is None:
            student = plain_model(self.accelerator.unwrap_model(self.model))
            models = [student] if self.teacher is None or self.teacher is student else [student, self.teacher]
            backend = args.torch_compile_backend or "inductor"
            self._layers = CompiledLayers(*models, backend=backend, mode=args.torch_compile_mode)
        return self._layers()

    @contextmanager
    def _span_attention(self, model: nn.Module, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        device = self.args.device
        context = SpanContext(inputs["layout"].to(device))
        rows = {name: send(inputs[name], device) for name in ("prefix_rows", "anchor_rows")}
        with attention_context(plain_model(self.accelerator.unwrap_model(model)), context):
            yield {**inputs, "layout": context, **rows}

    def _target(self) -> str:
        """What the student learns now: the data's tokens first, where a warm-up asks for it. Evaluation has one aim."""
        warming_up = self.model.training and self.state.global_step < self.args.gt_warmup_steps
        return "gt" if warming_up else self.args.teacher_target

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
        prefix_weight, anchor_weight = self.args.prefix_weight, self.args.anchor_kl_weight

        def forward(tokens: Tensor, context: SpanContext, prefix_rows: Tensor, anchor_rows: Tensor) -> MTPLoss:
            with self.accelerator.autocast():
                return mtp_loss(
                    plain_model(core),
                    self.teacher,
                    tokens,
                    context,
                    mask_token_id=self.mask_token_id,
                    eos_token_ids=self.eos_token_ids,
                    target=self._target(),  # type: ignore[arg-type]
                    loss_support=self.args.loss_support,  # type: ignore[arg-type]
                    prefix_rows=prefix_rows if prefix_weight else None,
                    anchor_rows=anchor_rows if anchor_weight else None,
                    eos_padding=self.args.eos_padding,
                    as_teacher=core.disable_adapter if isinstance(core, PeftModel) else None,
                )

        with forward_as(core, forward):
            sums: MTPLoss = model(*(inputs[n] for n in ("input_ids", "layout", "prefix_rows", "anchor_rows")))
        text = prefix_weight * sums.prefix / counts[1] + anchor_weight * sums.anchor / counts[2]
        loss = (sums.span / counts[0] + text) * self.accelerator.num_processes
        # Kept for the next log; the graph must not live that long.
        scalars = {name: getattr(sums, name).detach() for name in ("span", "prefix", "anchor")}
        self._sums.append(replace(sums, **scalars))
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
        self._require_finite()
        training_sums, self._sums = self._sums, []
        start = time.perf_counter()
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._sums = training_sums
            # Evaluation is no part of training's throughput.
            self._seen.since += time.perf_counter() - start

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As Trainer's, and the held-out prompts decoded: among its metrics they are logged and choose the best."""
        output = super().evaluation_loop(*args, **kwargs)
        if self.held_out is not None:
            output.metrics.update(self._decode_held_out(self.held_out))
        return output

    def _decode_held_out(self, held_out: HeldOut) -> dict[str, float]:
        # Shards of FSDP are gathered in every pass, so that all ranks must make the same passes.
        alone = self.is_fsdp_enabled
        ranks, rank = (1, 0) if alone else (self.args.world_size, self.args.process_index)
        sums = held_out.count(plain_model(self.accelerator.unwrap_model(self.model)), rank, ranks)
        if not alone:
            sums = self.accelerator.reduce(sums.float().to(self.args.device), "sum")
        return {f"eval_{name}": value for name, value in figures(sums).items()}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add agreement by position, agreeing-prefix length, confidence, entropy and throughput since the last log."""
        self._require_finite()
        if self._sums:
            evaluated = any(name.startswith("eval_") for name in logs)
            for name, value in self._statistics().items():
                logs["eval_" + name if evaluated else name] = value
            if not evaluated:
                logs.update(self._seen.rates())
                self._seen = _Seen()
        super().log(logs, *args, **kwargs)

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

    def get_train_dataloader(self) -> DataLoader:
        """As Trainer's; a stream begins again where it ends."""
        if isinstance(self.train_dataset, IterableDataset) and not isinstance(self.train_dataset, Endless):
            self.train_dataset = Endless(self.train_dataset)
        return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """As Trainer's; sorting by length draws from the global state, which a run resumed in a later epoch has not."""
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):

            def set_epoch(epoch: int) -> None:
                if epoch > 0:
                    sampler.generator = torch.Generator().manual_seed(cast(int, self.args.data_seed) + epoch)

            sampler.set_epoch = set_epoch
        return sampler

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As Trainer.train; True resumes the newest complete checkpoint of output_dir.

        Raises ValueError where there is none, or where the given one was left half-written.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_checkpoint(cast(str, self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(f"no complete checkpoint in {self.args.output_dir}: start without resuming")
        if isinstance(resume_from_checkpoint, str):
            require_whole(resume_from_checkpoint)
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self.is_world_process_zero():
            summarise(self.state.log_history, cast(str, self.args.output_dir))
        return result

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Trainer's, but a kill at any moment leaves the last complete checkpoint findable."""
        self._require_finite(weights=True)
        args, run = self.args, Path(self._get_output_dir(trial=trial))
        folder = run / f"checkpoint-{self.state.global_step}"
        if args.should_save and folder.exists():
            remove_checkpoint(folder)
        self.accelerator.wait_for_everyone()
        # Trainer would delete older checkpoints before this one counts.
        limit, args.save_total_limit = args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if args.should_save:
            if not args.save_only_model:
                mark_complete(folder)
            rotate(run, limit, self.state.best_model_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a plain Hugging Face checkpoint in save_dtype, adapters merged, with the tokenizer.

        The resumable checkpoints inside training keep float32 weights, or the adapters alone.
        """
        if _internal_call:
            # FSDP's own files, which come next, hold all weights: no second copy of them.
            if not self.is_fsdp_enabled:
                super().save_model(output_dir, _internal_call=True)
            return
        self._require_finite(weights=True, alone=not self.is_fsdp_enabled)
        core = self.accelerator.unwrap_model(self.model)
        state: dict[str, Tensor] = {}
        if self.is_fsdp_enabled:
            # Gathered on rank 0, one after the other.
            whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state = cast(dict[str, Tensor], get_model_state_dict(self.model, options=whole))
        if not self.args.should_save:
            return
        plain = merged(core) if isinstance(core, PeftModel) else core
        dtype = getattr(torch, self.args.save_dtype)
        # A tied head that was gathered by itself is a copy of the embedding.
        tied = plain.all_tied_weights_keys if plain.config.get_text_config().tie_word_embeddings else {}
        state = {name: x for name, x in state.items() if name not in tied} or plain.state_dict()
        state = _cast(state, dtype)
        folder = Path(output_dir or cast(str, self.args.output_dir))
        plain.save_pretrained(folder, state_dict=state)
        # The config as the saved weights are, not as they were while training, where the cache is off.
        config = deepcopy(plain.config)
        config.use_cache, config.dtype = True, dtype
        config.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _statistics(self) -> dict[str, float]:
        """Means over the collected batches and all ranks; rows of different k are padded to k_max."""
        table = torch.zeros(5, max(2, self.args.k_max), device=self.args.device)
        for sums in self._sums:
            k = len(sums.rows)
            table[0, :k] += sums.agree.detach()
            table[1, :k] += sums.rows.detach()
            table[2, :k] += sums.confidence.detach()
            table[3, :k] += sums.entropy.detach()
            table[4, 0] += sums.agreeing_prefix.detach()
            table[4, 1] += sums.spans.detach()
        self._sums.clear()
        agree, rows, confidence, entropy, other = self.accelerator.reduce(table, "sum").tolist()
        logs = {"agreement": sum(agree) / max(1.0, sum(rows)), "agreeing_prefix": other[0] / max(1.0, other[1])}
        for j, n in enumerate(rows):
            if n:
                logs[f"agreement_{j + 1}"] = agree[j] / n
                logs[f"confidence_{j + 1}"] = confidence[j] / n
                logs[f"entropy_{j + 1}"] = entropy[j] / n
        return logs
