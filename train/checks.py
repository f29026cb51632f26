"""What is checked before the first step, so that no hours are lost to what could have been known."""

from __future__ import annotations

from mtpkern.train.extra import DynamoBackend, PeftModel  # isort: split

import logging
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer
from transformers.integrations import is_fsdp_enabled
from transformers.integrations.integration_utils import get_available_reporting_integrations

from mtpkern.adapter_config import is_quantised
from mtpkern.attention import exclusive
from mtpkern.loading import holds_adapter, require_model
from mtpkern.model import evaluating, is_tested
from mtpkern.train.arguments import refuse
from mtpkern.train.collator import earlier_answers, require_example
from mtpkern.train.config import ModelArguments, MTPConfig
from mtpkern.train.data import BadData, DataArguments, EncodedTexts, require_readable
from mtpkern.train.lora import plain_model, require_targets
from mtpkern.train.objective import head_of
from mtpkern.verify import require_verified

logger = logging.getLogger(__name__)

# How peft begins adapters that it takes out of the base's own weights.
_OUT_OF_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def require_consistent(model: ModelArguments, data: DataArguments, config: MTPConfig) -> None:
    """Raise ValueError, before anything is loaded, for options of two groups that contradict one another."""
    held_out = data.eval_data or data.eval_fraction
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        refuse(getattr(config, name) < 1, f"{name} must be at least 1; got {getattr(config, name)}")
    sizes = ("learning_rate", "dataloader_num_workers", "max_grad_norm", "weight_decay", "warmup_steps", "adam_epsilon")
    for name in sizes:
        refuse(getattr(config, name) < 0, f"{name} must be 0 or more; got {getattr(config, name)}")
    for name in ("adam_beta1", "adam_beta2"):
        refuse(not 0 <= getattr(config, name) < 1, f"{name} must be from 0 to below 1; got {getattr(config, name)}")
    for name, bits in (("seed", 32), ("data_seed", 63)):
        value = getattr(config, name)
        refuse(not 0 <= value < 1 << bits, f"{name} must be from 0 to below 2**{bits}; got {value}")
    unpaired = [part for part in (config.optim_args or "=").split(",") if part.count("=") != 1]
    refuse(unpaired, f"optim_args must be names and values, as in a=1,b=2; got {config.optim_args!r}")
    if config.max_steps == 0 or (config.max_steps < 0 and config.num_train_epochs <= 0):
        raise ValueError("nothing would be trained: give a positive max_steps, or num_train_epochs with max_steps -1")
    refuse(data.streaming and config.max_steps <= 0, "streaming data have no known length; set max_steps")
    order = config.train_sampling_strategy
    refuse(
        data.streaming and order != "random",
        f"streaming data have an order of their own; leave out train_sampling_strategy, which is {order!s}",
    )
    refuse(data.decode_rows and not held_out, "decode_rows needs held-out rows; give eval_data or eval_fraction")
    if config.eval_strategy != "no" and not held_out:
        raise ValueError("eval_strategy needs held-out rows; give eval_data or eval_fraction, or set eval_strategy: no")
    if config.bidirectional and data.decode_rows:
        raise ValueError("mtpkern.generate cannot decode a bidirectional model; set decode_rows to 0")
    if model.teacher is not None and config.lora_rank > 0:
        raise ValueError("with LoRA the teacher is the student without its adapters; leave teacher out")
    if model.teacher is not None and not config.needs_teacher:
        raise ValueError("teacher_target 'gt' without anchor_kl_weight asks no teacher; leave teacher out")
    absent = sorted({*config.report_to} - {*get_available_reporting_integrations()})
    refuse(
        absent,
        f"report_to names {', '.join(absent)}, which is not installed or unknown; pip install it, or leave it out",
    )
    refuse(
        isinstance(config.lr_scheduler_kwargs, str),
        f"lr_scheduler_kwargs must be names and values, as JSON in a flag; got {config.lr_scheduler_kwargs!r}",
    )
    for name, value in vars(config).items():
        odd = isinstance(value, float) and (math.isnan(value) or (name == "learning_rate" and math.isinf(value)))
        refuse(odd, f"{name} must be a finite number; got {value}")
    out = Path(str(config.output_dir))
    read = [name for name in (model.model, model.teacher, config.init_adapter) if name and Path(name).exists()]
    within = [name for name in read if Path(name).resolve() in (out.resolve(), *out.resolve().parents)]
    refuse(
        within,
        f"output_dir {out} is, or lies in, {', '.join(within)}, which the run reads and would write over; take another "
        "output_dir (a run that was stopped goes on from there by itself, with the model it began with)",
    )
    files = [str(path) for path in (out, *out.parents) if path.is_file()]
    refuse(files, f"output_dir must be a folder; {', '.join(files)} is a file")


def require_sources(model: ModelArguments, data: DataArguments) -> str:
    """Look at what a run is made of before any weights are loaded: the first rows of the data, and whose models exist.

    Returns the format of the training data. Raises ValueError or OSError for a source that is missing or cannot be
    reached, for other columns than expected, and for a folder without weights.
    """
    data_format = require_readable(data)
    for name in filter(None, (model.model, model.teacher)):
        load(AutoConfig, name)
        folder = Path(name)
        if folder.is_dir() and not any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir()):
            raise FileNotFoundError(f"{name}: there are no weights in this folder; give a whole checkpoint")
    return data_format


def require_targets_of(name: str, targets: str) -> None:
    """Raise ValueError for `lora_targets` that the model does not have, of which only the configuration is read."""
    if targets != "all-linear":
        with torch.device("meta"):
            require_targets(AutoModelForCausalLM.from_config(load(AutoConfig, name)), targets)


def load(kind: Any, name: str, **options: Any) -> Any:
    """`load(AutoTokenizer, "my-model")`: loaded, never with code of its own; errors name the checkpoint."""
    require_model(name)
    refuse(
        holds_adapter(name),
        f"{name} holds an adapter, no model: give what `mtpkern convert {name} NEW` makes of it and its base, or, of a "
        f"gated one, the base, with init_adapter {name}",
    )
    try:
        return kind.from_pretrained(name, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        raise OSError(f"{name} cannot be loaded: {' '.join(str(error).split())}") from error


def require_trainable(model: nn.Module, args: MTPConfig) -> None:
    """Raise ValueError for a model that mtpkern would decode wrong, or whose attention it cannot take the place of.

    Known kinds pass; others are tried as `mtpkern.generate` tries them. The model is left in the mode that it was in.
    """
    plain = plain_model(model)
    # gptqmodel says so of the kernels that it has chosen.
    fixed = {type(layer).__name__ for layer in plain.modules() if getattr(layer, "SUPPORTS_TRAINING", None) is False}
    refuse(
        fixed,
        f"the kernels of {', '.join(sorted(fixed))} have no backward, and no layer before them could be trained; load "
        "the base with quantization_config=GPTQConfig(bits=..., backend='auto_trainable'), or write that into its "
        "config.json",
    )
    if (args.process_index and is_fsdp_enabled()) or any(p.is_meta for p in plain.parameters()):
        return  # the first process has the weights
    with exclusive(plain), evaluating(plain):
        require_verified(plain, 0)  # any token stands for the masks of a trial
        if not is_tested(plain):
            _require_read_head(plain)


@torch.no_grad()
def _require_read_head(model: PreTrainedModel) -> None:
    """Raise ValueError for a model whose logits are others than those that training makes of its last states."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if weight is None or not weight.is_floating_point():
        return  # quantised, which is said where adapters are made
    # Tokens with a meaning of their own stand at the ends of a vocabulary.
    ids = (torch.arange(8, device=model.device)[None] + len(weight) // 2) % len(weight)
    own = model(input_ids=ids, use_cache=False).logits.float()
    head, states = head_of(model, None), model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    read = head.logits(states.to(head.weight.dtype).flatten(0, 1)).view(*ids.shape, -1)
    # Of a standard deviation; less than float32 rounds.
    rounding = 1e-3 if {model.dtype, head.weight.dtype} == {torch.float32} else 0.05
    refuse(
        own.shape != read.shape or not bool((own - read).abs().max() <= rounding * own.std()),
        f"{type(model).__name__} makes its logits otherwise than training reads them: of its last states by the head's "
        f"weight and bias, a factor ({head.logit_scale:g} by its config) and a cap; none of its kind can be trained "
        "here, mtpkern.generate decodes it one token a pass",
    )


def warn_of_dropout(model: PreTrainedModel) -> None:
    """Say that a model's attention drops nothing in training, where its configuration asks for it."""
    asked = {
        name: value
        for name, value in vars(model.config.get_text_config(decoder=True)).items()
        if "drop" in name and ("attn" in name or "attention" in name) and isinstance(value, float) and value > 0
    }
    if asked:
        logger.warning(
            f"{type(model).__name__} asks for {', '.join(f'{name}={value}' for name, value in asked.items())}, which "
            "is left out: the span attention of training drops nothing"
        )


def warn_of_taught(model: nn.Module) -> None:
    """Say that adapters which a model brings along are no part of its teacher, where they have been trained before."""
    taught = (name for name, x in model.named_parameters() if "lora_B" in name and not x.is_meta and bool(x.any()))
    if isinstance(model, PeftModel) and next(taught, None) is not None:
        logger.warning(
            "the adapters of this model have been trained already, and its teacher is the model without them: what "
            "they have learned is unlearned. Adapters of fine-tuning are to be merged first: model.merge_and_unload()"
        )


def require_sound(model: nn.Module, teacher: PreTrainedModel | None, args: MTPConfig) -> None:
    """Raise ValueError for a student and a teacher that do not fit together or the configuration.

    model: with the adapters that it brings; those that lora_rank asks for come later, in float32
    """
    adds = args.lora_rank > 0 and not isinstance(model, PeftModel)
    adapted = adds or isinstance(model, PeftModel)
    if isinstance(model, PeftModel):
        refuse(
            args.lora_alpha is not None or args.lora_targets != "all-linear",
            "the model brings adapters of its own, with their alpha and targets; leave lora_alpha and lora_targets out",
        )
        require_adapters(model, args)
    refuse(
        is_quantised(plain_model(model)) and not args.gated,
        "the model's weights are quantised, and what is trained here ends as a plain checkpoint: set gated=True for an "
        "adapter beside them, or load them in bfloat16 with student_dtype='bfloat16' (mtpkern convert makes them so), "
        "frozen behind lora_rank",
    )
    if adapted and teacher is not None:
        raise ValueError("with LoRA the teacher is the student without its adapters: leave teacher= out")
    part = "anchor_kl_weight" if args.teacher_target == "gt" else f"teacher_target {args.teacher_target!r}"
    refuse(teacher is None and not adapted and args.needs_teacher, f"{part} needs teacher=, the frozen original model")
    trained = {torch.float32} if adds else {p.dtype for p in model.parameters() if p.requires_grad}
    refuse(
        not trained,
        "nothing of the model requires a gradient; give one whose weights do, or adapters that were loaded to be "
        "trained: PeftModel.from_pretrained(model, path, is_trainable=True)",
    )
    if args.pure_bf16 and trained != {torch.bfloat16}:
        raise ValueError(f"pure_bf16 trains bfloat16 weights; got {trained}: load with dtype=torch.bfloat16")
    if not args.pure_bf16 and trained - {torch.float32, torch.float64}:
        raise ValueError(f"trained weights must be float32; got {trained}: load with dtype=torch.float32, bf16=True")
    frozen = {p.dtype for p in model.parameters() if (adds or not p.requires_grad) and p.is_floating_point()}
    # Autocast narrows float32 weights itself, in every step.
    wide = {torch.float32} if args.gated and args.bf16 else set()
    refuse(
        adapted and frozen - wide - {getattr(torch, cast(str, args.student_dtype))},
        f"the frozen weights are {', '.join(map(str, frozen))}, student_dtype is {args.student_dtype!r}: load the "
        "model in that dtype, or set student_dtype to its own",
    )
    if teacher is not None:
        ours, theirs = (m.get_output_embeddings().weight.shape[0] for m in (plain_model(model), teacher))
        # add_mask_token may have given the student rows that the teacher lacks, up to a multiple of 64.
        refuse(
            not 0 <= ours - theirs <= 64,
            f"student and teacher must share a vocabulary; got {ours} and {theirs} rows: load both from one "
            "checkpoint, then add the mask token to the student",
        )


def require_adapters(model: PeftModel, args: MTPConfig) -> None:
    """Raise ValueError for adapters of another rank than is asked for, and for what would not be trained, or taught."""
    head: Any = plain_model(model).get_output_embeddings()
    for name in model.active_adapters:
        config = model.peft_config[name]
        rank = getattr(config, "r", None)
        refuse(
            config.is_prompt_learning,
            f"the adapter {name!r} puts virtual tokens before a text, which the passes of training know nothing of; "
            "take one that changes layers, such as LoRA",
        )
        refuse(
            args.lora_rank not in (0, rank),
            f"the model's adapter {name!r} has rank {rank}, and lora_rank is {args.lora_rank}; set lora_rank: {rank}",
        )
        refuse(
            name in getattr(head, "lora_A", ()),
            f"the adapter {name!r} changes the output head, which training reads as a weight: nothing of it would "
            "learn; leave the head out of lora_targets (target_modules), or put it into modules_to_save",
        )
        start, bias = getattr(config, "init_lora_weights", True), getattr(config, "bias", "none")
        moves = f"init_lora_weights={start!r}" if str(start).startswith(_OUT_OF_THE_BASE) else ""
        moves = moves or (f"bias={bias!r}" if bias != "none" else "")
        refuse(
            moves and args.needs_teacher,
            f"the adapter {name!r} has {moves}, which changes the base's own weights, and so the model without its "
            "adapters, which is the teacher; make it without, or set teacher_target: gt, without an anchor",
        )


def are_at_hand(texts: Any) -> bool:
    """Whether a data set's examples can be looked at before training: in memory, or of `datasets`; no stream is."""
    kept = isinstance(texts, (list, tuple, EncodedTexts)) or hasattr(texts, "features")
    return kept and hasattr(texts, "__len__")


def require_counted(name: str, texts: Any, args: MTPConfig, known: Callable[[Any], None]) -> None:
    """Look for examples of which nothing counts: they train nothing, and a run of them alone would end well.

    Raises BadData, a ValueError, with the number of one that is faulty, and where nothing counts of any. Of some whose
    answer is empty, or behind max_length, it warns. known: raises ValueError for ids that are none of the model's
    """
    bare = []
    for number, x in enumerate(texts, 1):
        try:
            require_example(x)
            known(x["input_ids"])
        except ValueError as fault:
            raise BadData(f"{name}, example {number}: {fault}") from None
        if not _counts(x, args):
            bare.append(number)
    if bare:
        within, remedy = "", "mend prompt_length"
        if args.max_length is not None:
            within, remedy = f" within {args.most_tokens} tokens", "raise max_length"
        says = (
            f"{name}: of {len(bare)} examples in {len(texts)} nothing counts, the first is example {bare[0]}: there is "
            f"no answer behind the prompt{within}; {remedy}, or leave them out"
        )
        if len(bare) == len(texts):
            raise BadData(says)
        if args.process_index == 0:
            logger.warning(says)


def require_batches(loader: DataLoader) -> None:
    """Raise ValueError for an evaluation of nothing, whose figures would be none: `require_batches(dataloader)`."""
    try:
        batches, texts = len(loader), len(cast(Any, getattr(loader, "dataset", loader)))
    except TypeError:  # a stream has no length
        return
    refuse(
        not batches,
        f"no batch of texts to evaluate: expected one at least, and {texts} texts make none; give more, or where "
        "dataloader_drop_last is set, lower per_device_eval_batch_size or leave dataloader_drop_last out",
    )


def _counts(x: Mapping[str, Any], args: MTPConfig) -> bool:
    """Whether a token counts within max_length; the very first has nothing before it to be predicted from."""
    tokens = min(len(x["input_ids"]), args.most_tokens or sys.maxsize)
    answers = [(x["prompt_length"], tokens), *earlier_answers(x)]
    if not args.response_only or (args.prefix_weight and args.prefix_scope == "all"):
        answers = [(0, tokens)]
    return any(max(1, start) < min(end, tokens) for start, end in answers)


def require_tested_engine(trainer: Trainer) -> None:
    """Raise ValueError for engines chosen from outside (accelerate launch, the number of GPUs) and untested."""
    args, model = trainer.args, plain_model(cast(nn.Module, trainer.model))
    sharded = trainer.is_fsdp_enabled
    refuse(trainer.is_deepspeed_enabled, "DeepSpeed, ZeRO-3 included, is untested here and refused; use FSDP2 or DDP")
    refuse(args.n_gpu > 1, "several GPUs in one process are refused; start one process a GPU: torchrun or accelerate")
    if sharded and not trainer.accelerator.is_fsdp2:
        raise ValueError("FSDP asked for, but accelerate has set up none (version 1, one process, or a CPU); omit it")
    if args.fsdp and not sharded and trainer.is_world_process_zero():
        logger.warning(
            "fsdp has no effect on this device, where accelerate shards nothing: every rank holds all weights"
        )
    if sharded and args.torch_compile:
        raise ValueError("torch_compile under FSDP is untested here and refused; use DDP, or leave it out")
    if sharded and is_quantised(model):
        raise ValueError("a quantised base under FSDP is untested here and refused; use DDP, or a bfloat16 base")
    if sharded and isinstance(trainer.model, PeftModel) and not args.gated:
        raise ValueError("LoRA under FSDP is refused: saving cannot merge shards; use DDP, or a gated adapter")
    if trainer.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO and not args.torch_compile:
        raise ValueError("accelerate's dynamo_backend is refused; set it to 'no', and torch_compile=True here")
    if getattr(model, "_device_mesh", None) is not None:
        raise ValueError("a model sharded by from_pretrained (tensor parallel) is refused; load it whole")
