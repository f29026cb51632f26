"""What a training run is configured by: which model, and MTPConfig, TrainingArguments for multi-token prediction.

Source   arXiv 2602.06019, training details
"""

from __future__ import annotations

from mtpkern.train.extra import DynamoBackend

# isort: split

import inspect
import json
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass
from typing import Any, cast

import torch
from transformers import TrainingArguments
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils import is_torch_bf16_gpu_available

from mtpkern.strategies import LARGEST_K
from mtpkern.train.arguments import option, refuse, require_one_of
from mtpkern.train.compilation import CUDA_GRAPH_MODES

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class ModelArguments:
    """Which model is trained."""

    model: str = option(MISSING, "The checkpoint to train: a path or hub id.")
    teacher: str | None = option(None, "The frozen teacher; the checkpoint to train unless given.")


@contextmanager
def _former_names(args: MTPConfig) -> Iterator[None]:
    """Around TrainingArguments' checks: where they know only gradient_checkpointing, it stands for the new name."""
    if hasattr(TrainingArguments, "activation_checkpointing"):
        yield
        return
    names = {f"activation_checkpointing{end}": f"gradient_checkpointing{end}" for end in ("", "_kwargs")}
    for new, old in names.items():
        if getattr(args, new) is not None:
            setattr(args, old, getattr(args, new))
    yield
    for new, old in names.items():
        setattr(args, new, getattr(args, old))


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

    k_min: int = option(2, "Smallest number of predictions of a span.")
    k_max: int = option(16, "Largest; k is drawn anew each step, uniform on k_min..k_max.")
    k_scope: str = option("step", "Who shares a k: all ranks of a 'step', or each 'rank'.")
    num_spans: int | None = option(
        None, "Spans a text; unless given, of its N tokens, the paper's N // (2 * k_max), N // k_max if 'random'."
    )
    spacing: str = option(
        "stride", "'stride' (num_spans regions share the tokens that count, a span in each), or 'random'."
    )
    span_offset: int | None = option(None, "Offset in tokens of the first span of a stride; drawn anew unless given.")
    offset_scope: str = option(
        "sequence", "Who shares a drawn offset: a 'sequence' has its own, or all of a 'rank' in a step have one."
    )
    layout: str = option("default", "max_length counts the text's tokens, or with 'paper' the masks too.")
    max_length: int | None = option(None, "Longer texts are treated as long_rows says; None takes all.")
    response_only: bool = option(True, "Spans in answers only, in those of every turn; else anywhere in the text.")
    eos_padding: bool = option(True, "Predictions behind the text's EOS count, with EOS as the data's token.")
    teacher_target: str | None = option(
        None, "'hard', 'soft', or 'gt' (no teacher pass); 'hard' unless given, gated 'gt'."
    )
    gt_warmup_steps: int = option(0, "First steps that learn the data's tokens, without a teacher pass.")
    loss_support: str | None = option(
        None,
        "'all' rows of a span, or 'until_fail': to the first that misses its target; unless given 'all', gated "
        "'until_fail'.",
    )
    prefix_weight: float = option(0.0, "Weight of a next-token loss on the data's tokens, in the rows of prefix_scope.")
    prefix_scope: str = option("answer", "Tokens of the next-token loss: the 'answer', or 'all', the prompt's too.")
    anchor_kl_weight: float = option(
        0.0, "Weight of the teacher's KL on the answer's rows; keeps plain decoding as it was."
    )
    static_shape: bool = option(False, "Reserve mask rows for k_max at every k.")
    packing: bool = option(False, "A micro-batch is one row without padding; for GPUs, whose kernel skips.")
    bidirectional: bool = option(
        False, "Masks of a span see one another both ways: an ablation that mtpkern.generate refuses."
    )
    gated: bool = option(
        False,
        "Adapters that act on mask rows only, for the original model's own tokens; needs lora_rank, and texts that the "
        "model wrote itself unless teacher_target is 'hard' or 'soft'.",
    )
    prefix_memory: float = option(
        0.0,
        "GiB of the model's memory, on each rank, for what a gated adapter's frozen model makes of texts: kept for the "
        "whole run; 0 computes it anew in each step.",
    )
    lora_rank: int = option(0, "Rank of LoRA adapters; 0 trains all parameters.")
    lora_alpha: float | None = option(None, "LoRA's scale; twice the rank unless given.")
    lora_targets: str = option("all-linear", "Modules with adapters, separated by commas, or 'all-linear'.")
    init_adapter: str | None = option(
        None, "Gated adapter of the same base and rank that training begins with; a new one unless given."
    )
    student_dtype: str | None = option(
        None,
        "Of the loaded student (default float32, gated with bf16 on a GPU bfloat16); bfloat16 or float16 only for "
        "weights that LoRA freezes.",
    )
    pure_bf16: bool = option(
        False, "Train bfloat16 weights without float32 ones beside them: at a low rate most of them freeze."
    )
    teacher_dtype: str | None = option(None, "The teacher is cast to it; as loaded if None.")
    save_dtype: str = option("float32", "Of the final checkpoint that save_model writes.")
    allow_changes: list[str] = option(
        [], "Options in which a run may go on from a checkpoint other than it was; else they are refused."
    )
    data_seed: int | None = option(None, "Of the data's order; seed unless given.")
    ddp_find_unused_parameters: bool | None = option(
        False, "DDP's search for weights without a gradient; every step here uses all."
    )
    remove_unused_columns: bool = option(False, "Columns are the collator's business.")
    # As transformers 5.23 has them; 5.17 knows the former names alone, which all versions take.
    activation_checkpointing: bool | None = option(
        None, "Run layers again in backward instead of keeping all they compute.", nargs="?", const=True
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = option(
        None, "Options of activation_checkpointing, as transformers lists them."
    )
    torch_compile: bool | None = option(
        None,
        "Compile the decoder layers of student and teacher, for training steps alone (default: of gated adapters on a "
        "GPU).",
        nargs="?",
        const=True,
    )
    torch_compile_backend: str | None = option(None, "Sets torch_compile; 'inductor' unless given.")
    torch_compile_mode: str | None = option(None, "Sets torch_compile; modes that make CUDA graphs are refused.")
    cuda_graph: bool | None = option(
        None,
        "Steps of gated adapters as CUDA graphs, one for each shape of a batch: on one GPU, without packing, "
        "prefix_memory, accumulation or checkpointing (default: wherever these allow it).",
        nargs="?",
        const=True,
    )
    logging_nan_inf_filter: bool = option(False, "A loss that is not finite is an error.")

    def __post_init__(self) -> None:
        # Before transformers asks for its package.
        refuse(self.deepspeed, "DeepSpeed, ZeRO-3 included, is untested here and refused; use FSDP2 (fsdp=True) or DDP")
        # transformers would ask for use_cpu alone, and on most CPUs that is slow.
        refuse(
            (self.bf16 or self.bf16_full_eval) and not self.use_cpu and not is_torch_bf16_gpu_available(),
            "bf16 needs a GPU that computes in bfloat16, and torch finds none here; to train on the CPU set "
            "use_cpu: true and bf16: false (--use-cpu --bf16 false)",
        )
        # The parents must not see it: TrainingArguments would switch TF32 on, which rounds rotary positions too.
        compiler = self.torch_compile, self.torch_compile_backend, self.torch_compile_mode
        self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = False, None, None
        try:
            with _former_names(self):
                super().__post_init__()
        except json.JSONDecodeError as error:
            names = [name for name in self._VALID_DICT_FIELDS if getattr(self, name) == error.doc]
            says = f"{', '.join(names)} must be names and values, as JSON in a flag; got {error.doc!r}: {error}"
            raise ValueError(says) from None
        _, self.torch_compile_backend, self.torch_compile_mode = compiler
        if not torch.accelerator.is_available():
            # torch would pin nothing, and warn.
            self.dataloader_pin_memory = False
        # What runs as it is where it cannot be compiled: nobody has asked.
        self.compiles_if_it_can = compiler == (None, None, None)
        # A gated step of 64 texts on an H200: 0.075 s with compiled layers, a bfloat16 base and a CUDA graph, 0.35 s
        # without (bench/results/h200). Nobody has measured other training.
        self.torch_compile = self.gated and self._pays_to_compile() if self.compiles_if_it_can else any(compiler)
        narrow = self.gated and self.bf16 and self.device.type == "cuda"
        for name, unless_given in (
            # Else the order of the data hangs on whatever has been seeded last, and a resumed run may see another.
            ("data_seed", self.seed),
            ("teacher_target", "gt" if self.gated else "hard"),
            ("loss_support", "until_fail" if self.gated else "all"),
            ("student_dtype", "bfloat16" if narrow else "float32"),
        ):
            if getattr(self, name) is None:
                setattr(self, name, unless_given)
        self._require_values()
        self._require_room()
        self._require_consistent()
        against = self._against_graphs()
        if self.cuda_graph and against:
            raise ValueError(f"cuda_graph is of gated adapters on one GPU, and not with {against}; leave it out")
        self.cuda_graph = self.cuda_graph or (self.cuda_graph is None and not against)
        self._refuse_untested()

    def _require_values(self) -> None:
        """Raise ValueError for an option that is none of those there are, or out of its range."""
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
            ("torch_compile_backend", (None, *(name.lower() for name in DynamoBackend.list() if name != "NO"))),
        ):
            require_one_of(name, getattr(self, name), allowed)
        if self.torch_compile_backend in (None, "inductor"):
            require_one_of("torch_compile_mode", self.torch_compile_mode, (None, *torch._inductor.list_mode_options()))
        for name in ("logging", "save", "eval"):
            steps, every = getattr(self, f"{name}_steps") or 0, getattr(self, f"{name}_strategy") == "steps"
            refuse(steps < 0 or (every and not steps), f"{name}_steps must be above 0; got {steps}")
        waits = self.eval_accumulation_steps
        refuse(waits is not None and waits < 1, f"eval_accumulation_steps must be at least 1; got {waits}")
        kwargs = self.lr_scheduler_kwargs if isinstance(self.lr_scheduler_kwargs, dict) else {}
        known = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[self.lr_scheduler_type]).parameters
        other = sorted(kwargs.keys() - known.keys())
        refuse(
            other and not any(one.kind is one.VAR_KEYWORD for one in known.values()),
            f"lr_scheduler_kwargs has {', '.join(other)}, which {self.lr_scheduler_type.value} does not know; it takes "
            f"{', '.join([*known][1:])}",
        )
        for name in ("gt_warmup_steps", "lora_rank", "prefix_weight", "anchor_kl_weight", "prefix_memory"):
            refuse(getattr(self, name) < 0, f"{name} must be at least 0; got {getattr(self, name)}")
        for name in ("prefix_weight", "anchor_kl_weight", "prefix_memory", "lora_alpha"):
            value = getattr(self, name)
            refuse(value is not None and not math.isfinite(value), f"{name} must be a finite number; got {value}")
        k_min, k_max, spans, offset = self.k_min, self.k_max, self.num_spans, self.span_offset
        refuse(not 1 <= k_min <= k_max, f"1 <= k_min <= k_max must hold; got k_min={k_min}, k_max={k_max}")
        says = f"k_max must be at most {LARGEST_K}, the largest k that mtpkern.generate decodes; got {k_max}: lower it"
        refuse(k_max > LARGEST_K, says)
        alpha = self.lora_alpha
        if alpha is not None and alpha <= 0:
            raise ValueError(f"lora_alpha must be above 0, or the adapter could do nothing; got {alpha}")
        if spans is not None and spans < 1:
            raise ValueError(f"num_spans must be at least 1, or None for a number by max_length; got {spans}")
        if offset is not None and (offset < 0 or self.spacing != "stride"):
            raise ValueError(f"span_offset must be at least 0 and needs spacing='stride'; got {offset}")

    def _require_consistent(self) -> None:
        """Raise ValueError for options that contradict one another."""
        draws = self.spacing == "stride" and self.span_offset is None
        for name, unset, met, needs in (
            ("offset_scope", "sequence", draws, "drawn offsets: spacing='stride' and no span_offset"),
            ("prefix_scope", "answer", self.prefix_weight, "the loss that it is of: prefix_weight > 0"),
            ("lora_alpha", None, self.lora_rank, "lora_rank > 0"),
            ("lora_targets", "all-linear", self.lora_rank, "lora_rank > 0"),
            ("prefix_memory", 0, self.gated, "what only gated adapters leave as it is: gated"),
            ("init_adapter", None, self.gated, "a gated adapter to be trained: gated"),
        ):
            value = getattr(self, name)
            refuse(value != unset and not met, f"{name} needs {needs}; got {value!r}: set that, or leave {name} out")
        refuse(
            self.teacher_dtype is not None and (self.lora_rank or not self.needs_teacher),
            "teacher_dtype is of a second model; with LoRA the teacher is the student without its adapters, and "
            "teacher_target 'gt' without an anchor needs none: leave teacher_dtype out",
        )
        if self.pure_bf16:
            self._accept_pure_bf16()
        refuse(
            not self.pure_bf16 and self.lora_rank == 0 and self.student_dtype != "float32",
            f"student_dtype {self.student_dtype!r} needs lora_rank > 0: trained weights are float32; set bf16=True "
            "to compute in bfloat16, or pure_bf16=True to train bfloat16 weights all the same",
        )
        if self.gated:
            self._require_gateable()
        if self.init_adapter and (self.lora_alpha is not None or self.lora_targets != "all-linear"):
            raise ValueError("init_adapter brings its own lora_alpha and lora_targets; leave those out")
        if self.packing and self.static_shape:
            raise ValueError("packing leaves out all padding, static_shape adds it; set one of them")

    def _pays_to_compile(self) -> bool:
        """Whether layers are compiled where nobody says: wherever a GPU waits for the host to launch what is small."""
        sharded = bool(self.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")
        if self.device.type != "cuda" or sharded:
            return False
        if self.gated and self.activation_checkpointing:
            warnings.warn(
                "layers of gated adapters are not compiled under activation_checkpointing, which cannot hold what "
                "torch.compile leaves out; leave that out, or set torch_compile: false",
                stacklevel=2,
            )
            return False
        return True

    def _against_graphs(self) -> str:
        """The first that stands against steps as CUDA graphs; empty where nothing does."""
        reasons = {
            "a loss on all rows": not self.gated,
            f"a device of type {self.device.type}": self.device.type != "cuda",
            "several processes": self.world_size > 1 or self.fsdp,
            "gradient_accumulation_steps": self.gradient_accumulation_steps > 1,
            "prefix_memory": self.prefix_memory > 0,
            "packing": self.packing,
            "fp16": self.fp16,
            "activation_checkpointing": self.activation_checkpointing,
            "torch_empty_cache_steps": self.torch_empty_cache_steps is not None,
        }
        return next((reason for reason, against in reasons.items() if against), "")

    def _require_gateable(self) -> None:
        """Raise ValueError for options that mean nothing where the text's own rows are those of the frozen model."""
        refuse(self.lora_rank == 0, "gated adapters are LoRA: give lora_rank, such as 16")
        refuse(self.k_min < 2, "the first prediction of a gated span is the base's own: k_min must be at least 2")
        refuse(
            self.prefix_weight > 0 or self.anchor_kl_weight > 0,
            "prefix_weight and anchor_kl_weight are losses on rows that gated adapters do not change; leave them 0",
        )
        if self.bidirectional:
            raise ValueError("bidirectional spans cannot be decoded, and gated adapters are for decoding; omit it")
        # Checkpoints cannot hold what torch.compile leaves out, and would be run as they are, unsaid.
        refuse(
            self.torch_compile and self.activation_checkpointing,
            "torch_compile of gated adapters keeps attention out, which activation_checkpointing cannot hold; omit one "
            "of them",
        )

    @property
    def device(self) -> torch.device:
        """As TrainingArguments'; a rank on a CPU gets it without an index, to which torch.load cannot restore."""
        device: torch.device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def needs_teacher(self) -> bool:
        """Whether any part of the loss asks a teacher: the spans' target, or the anchor."""
        return self.teacher_target != "gt" or self.anchor_kl_weight > 0

    def spans_of(self, num_tokens: int) -> int:
        """How many spans a text of `num_tokens` gets, where they exist: `MTPConfig("out").spans_of(512) == 16`.

        Random positions get twice the paper's share, which paid in the ablation (docs/log.md), unless the masks count
        into the length.
        """
        if self.num_spans is not None:
            return self.num_spans
        period = self.k_max if self.spacing == "random" and self.layout == "default" else 2 * self.k_max
        return max(1, num_tokens // period)

    @property
    def most_tokens(self) -> int | None:
        """Of a text so many are read, whatever k is drawn: `MTPConfig("out", max_length=512).most_tokens == 512`."""
        if self.max_length is None or self.layout != "paper":
            return self.max_length
        return self.max_length - self.spans_of(self.max_length) * (self.k_max - 1)

    def _require_room(self) -> None:
        """Raise ValueError for a max_length that leaves fewer than two tokens of a text."""
        paper = self.layout == "paper"
        if self.max_length is None:
            refuse(paper, "layout='paper' counts masks into max_length; give max_length (the paper: 160)")
            return
        masks = self.max_length - cast(int, self.most_tokens)
        counted = f" and all {masks} masks of the spans (layout='paper')" if paper else ""
        refuse(
            self.max_length < 2 + masks,
            f"max_length must be at least {2 + masks}, for two tokens{counted}; got {self.max_length}: raise it"
            + (", or lower num_spans or k_max" if paper else ""),
        )

    def _accept_pure_bf16(self) -> None:
        """The student is bfloat16, its trained weights too; say what that costs. ValueError with other precisions."""
        given = [name for name in ("lora_rank", "bf16", "fp16") if getattr(self, name)]
        refuse(
            given or self.student_dtype == "float16",
            f"pure_bf16 trains all weights in bfloat16; leave out {', '.join(given) or 'student_dtype float16'}, or "
            "pure_bf16",
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
        for name in ("tp", "cp", "sp"):
            refuse(
                getattr(self.parallelism_config, f"{name}_size", 1) > 1,
                f"{name}_size > 1 in parallelism_config is untested here and refused; use FSDP2 or DDP",
            )
        if self.fsdp and int((self.fsdp_config or {}).get("version", 2)) != 2:
            raise ValueError("FSDP version 1 is untested here and refused; set fsdp_config={'version': 2}")
        refuse(
            self.torch_compile_mode in CUDA_GRAPH_MODES,
            f"torch_compile_mode {self.torch_compile_mode!r} makes CUDA graphs, one for each of the many shapes of a "
            "step, and is refused; use 'default' or 'max-autotune-no-cudagraphs'",
        )
        refuse(self.use_liger_kernel, "use_liger_kernel rewrites a forward that training here does not call; omit it")
        if self.neftune_noise_alpha is not None:
            raise ValueError("neftune_noise_alpha is untested here, and LoRA's teacher would see the noise; omit it")
        refuse(self.label_smoothing_factor, "label_smoothing_factor has no meaning for self-distillation; set it to 0")
        if not self.average_tokens_across_devices:
            raise ValueError("average_tokens_across_devices=False would weigh rows by rank; leave it True")
        accelerator = cast(AcceleratorConfig, self.accelerator_config)
        if accelerator.dispatch_batches or accelerator.split_batches:
            raise ValueError("dispatch_batches and split_batches are refused: each rank reads its own batches")
        # None would mean True for streamed data.
        accelerator.dispatch_batches = False
        # Else the host waits at every batch until the device has finished the step before.
        accelerator.non_blocking = self.dataloader_pin_memory
