"""generate_batch(): many prompts through a few slots that stay full.

A slot whose sequence has ended takes the next prompt while the others go on (mtpkern.refill, mtpkern.slots). Which is
next: by default the one that may become longest. Its neighbours are then of its length, so that those that are
prefilled together have hardly any padding, and what runs alone at the end is short.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation import MaxLengthCriteria, MaxTimeCriteria
from transformers.generation import logits_process as theirs

from mtpkern.adapter import adopt
from mtpkern.arguments import FIELDS, HONOURED, asked_by, inert, require_bool, require_prompts, require_tensors
from mtpkern.attention import ended_by_interrupts, exclusive, routed
from mtpkern.choosing import Choosing
from mtpkern.entry import entered, entry
from mtpkern.fields import OF_SAMPLING, whole_number
from mtpkern.generation import choosing_of, generate, past_positions, prepared, settings_of, stop_ids_of
from mtpkern.graph import without_kernels
from mtpkern.memory import require_room
from mtpkern.model import CACHE_ARGUMENTS, evaluating, has_latent_attention, learned_positions
from mtpkern.options import Options
from mtpkern.output import first_line
from mtpkern.parallel import agree, is_parallel
from mtpkern.pool import decoder_for, kept_bytes, release_graphs
from mtpkern.processors import numbers
from mtpkern.refill import BatchOutput as BatchOutput
from mtpkern.refill import Slots
from mtpkern.settings import MinTokens
from mtpkern.slots import Job, vacate
from mtpkern.streaming import Stream
from mtpkern.watch import of_kind
from mtpkern.wrappers import unwrapped

# What `generate` honours and means nothing here, or hangs on where the prompts of a batch end.
_ONLY_FOR_ONE_BATCH = {
    *("max_time", "num_return_sequences", "output_scores", "output_logits"),
    *("exponential_decay_length_penalty", "forced_eos_token_id"),
}
_HONOURED = (HONOURED | set(OF_SAMPLING) | {"logits_processor", "stopping_criteria"}) - _ONLY_FOR_ONE_BATCH
# Arguments of a model that `generate` of transformers hands on.
_OF_MODELS = {"attention_mask", "position_ids", "token_type_ids", "inputs_embeds", "logits_to_keep", *CACHE_ARGUMENTS}
# Processors of transformers' that are made for prompts of one length; the fields of their names mean each prompt's.
_OF_ONE_LENGTH = (
    *(theirs.MinNewTokensLengthLogitsProcessor, theirs.SuppressTokensAtBeginLogitsProcessor),
    *(theirs.ExponentialDecayLengthPenalty, theirs.ForcedEOSTokenLogitsProcessor),
)

# A text, ids, or a tensor of ids [T] or [1, T].
Prompt = str | Sequence[int] | Tensor | np.ndarray


def generate_batch(
    model: PreTrainedModel,
    prompts: Iterable[Prompt],
    *,
    progress: Callable[[int], object] | None = None,
    **options: Any,
) -> list[BatchOutput]:
    """Decode many prompts of any length, `batch_size` side by side; returns one `BatchOutput` each, in their order.

    prompts: token ids, as lists or tensors [T], or texts where `tokenizer` is given.
    batch_size: slots (8). One that becomes free takes the next prompt while the others go on.
    max_new_tokens: for all, or a list with one for each.
    order: "longest" decodes those first that may become longest, which wastes least; "given" as they come.
    reuse: the keys of tokens that a slot holds already are not made again: a prompt that begins like another is
        prefilled only from there on. Not with latent attention, whose caches hold something else.
    first: the number of the first prompt, where a call goes on behind others: what is drawn follows the number.
    seed: of the draws, in place of torch's own, and the same as `torch.manual_seed(seed)` before the call.
    progress: called with the number of prompts that are done.

    Sampling (do_sample=True, temperature, top_k and the others), penalties and other logits processors, stop_strings,
    stopping_criteria, eos_token_id and generation_config, strategy, mask_token_id, rows, use_graph, compile,
    batch_invariant, prefill_chunk, wait and check_model are those of `mtpkern.generate`, for each prompt as if it were
    alone: criteria get it as [1, t]. Criteria and processors must be functions of the text. What the model's own file
    asks for and greedy decoding leaves out is said in a warning. Without max_new_tokens the limit is that of the file.

    The draws of a prompt hang on the seed and the prompt's number alone: what else is in the batch, batch_size and
    order change nothing, and `mtpkern.generate` on the padded prompts draws the same behind the same seed.

    Each prompt gets the tokens that it would get alone (the model's matrix products may round otherwise for other
    numbers of rows, as in any batch). One that fails costs itself alone: it is empty, or holds what is no token of the
    model, or there is no room for it, or the model's logits hold NaN; its output says so in `error`. Raises ValueError
    or TypeError for a call that is wrong for all.

        outputs = mtpkern.generate_batch(model, prompts, tokenizer=tokenizer, max_new_tokens=256, batch_size=16)
        print(outputs[0].text, outputs[0].tokens_per_pass)
    """
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be a function of the number of prompts that are done, got {progress!r:.60}")
    outputs: list[BatchOutput] = []

    def take(output: BatchOutput) -> None:
        outputs.append(output)
        if progress is not None:
            progress(len(outputs))

    with entered("mtpkern.generate_batch"):
        batch = Batch(model, prompts, **options)
    batch.run(take)
    return sorted(outputs, key=lambda output: output.index)


def iterate_batch(model: PreTrainedModel, prompts: Iterable[Prompt], **options: Any) -> Stream[BatchOutput]:
    """`generate_batch` with the same arguments, read while it runs: yields each prompt's output as it ends.

    Raises what `generate_batch` raises, at once where the call is wrong. The run has a thread of its own; it ends
    behind the next pass where the reader leaves (`break`, an exception, `close`), and model and decoder stay whole.
    Outputs that were not read by then are lost.

        for output in mtpkern.iterate_batch(model, prompts, tokenizer=tokenizer, max_new_tokens=256):
            print(output.index, output.text)
    """
    with entered("mtpkern.iterate_batch"):
        batch = Batch(model, prompts, **options)

    def run(streamer: Any) -> None:
        streamer.put(torch.empty(0, dtype=torch.int64))  # the prompts are taken
        batch.run(streamer.put_block, streamer.closed)

    return Stream(run, batch.model.device)


class Batch:
    """A call, read and checked."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Iterable[Prompt],
        *,
        batch_size: int = 8,
        max_new_tokens: int | Sequence[int] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        order: str = "longest",
        reuse: bool = True,
        first: int = 0,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        adopt(model)
        one = isinstance(prompts, (str, bytes, bytearray, Tensor)) or hasattr(prompts, "keys")
        if one or not isinstance(prompts, Iterable):
            raise TypeError(
                f"prompts must be a list of prompts, each a text or its token ids, got {type(prompts).__name__}; "
                "padded tensors are for mtpkern.generate"
            )
        if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "decode")):
            raise TypeError(f"tokenizer must be the model's tokenizer itself, got {tokenizer!r:.60}")
        if order not in ("longest", "given"):
            raise ValueError(f"order must be 'longest' or 'given', got {order!r}")
        require_bool("reuse", reuse)
        self.model = model = unwrapped(model, kwargs)
        as_there = {n: p.default for n, p in signature(generate).parameters.items() if n in Options.NAMES}
        self.options = Options(model, {name: kwargs.pop(name, default) for name, default in as_there.items()})
        given = list(prompts)
        self.first = whole_number("first", first, least=0)
        self.batch_size = whole_number("batch_size", batch_size, least=1)
        seed = None if seed is None else _seed_of(seed)
        self.tokenizer, self.order = tokenizer, order
        # When the host learns of an end is up to each rank: what a slot holds then may decide nothing.
        self.reuse = reuse and not has_latent_attention(model) and not is_parallel(model)
        each = _limits(max_new_tokens, len(given))
        self.failed: list[BatchOutput] = []
        ids = [self._ids_of(number, prompt) for number, prompt in enumerate(given)]
        probe = next((x for x in ids if x is not None), None)
        self.stop_ids, self.criteria, choosing, new = self._prepare(probe, kwargs, each)
        self.choosing, self.key = choosing, None
        if choosing is not None and choosing.samples:
            # Once for the call, so that a run that begins anew draws the same.
            source = None if seed is None else torch.Generator(model.device).manual_seed(seed)
            self.key = torch.empty(1, dtype=torch.int64, device=model.device).random_(generator=source)
            agree(model, self.key)
        self.jobs = self._jobs(ids, new)

    def _ids_of(self, number: int, prompt: Prompt) -> np.ndarray | None:
        """The prompt's token ids [T]; None, with its output noted, where it has none that can be decoded."""
        if isinstance(prompt, str) and self.tokenizer is None:
            raise TypeError("prompts are texts: pass the model's tokenizer as tokenizer=, or token ids")
        try:
            if isinstance(prompt, str) and self.tokenizer is not None:
                prompt = self.tokenizer(prompt).input_ids
            try:
                # An array that counts backwards is none to torch.
                ids = torch.as_tensor(prompt.copy() if isinstance(prompt, np.ndarray) else prompt)
            except (TypeError, ValueError, RuntimeError):
                raise TypeError(f"a prompt must be a text or its token ids, got {prompt!r:.60}") from None
            if not ids.ndim:
                raise TypeError(f"a prompt must be a text or its token ids [T], got {prompt!r:.60}")
            if not ids.numel():
                raise ValueError("the prompt has no tokens; give one with text in it")
            ids = (ids[None] if ids.ndim == 1 else ids).cpu()
            if len(ids) != 1:
                raise ValueError(f"a prompt must be token ids [T], got shape {list(ids.shape)}")
            require_tensors(ids, None)
            vocabulary = self.model.get_input_embeddings().weight.shape[0]
            require_prompts(ids, None, mask_token_id=self.options.mask_token_id, vocabulary=vocabulary)
        except (TypeError, ValueError) as error:
            self._fail(number, error)
            return None
        # A copy, because the caller may fill the same buffer with the next while this one waits.
        return ids[0].long().numpy().copy()

    def _fail(self, number: int, error: Exception) -> None:
        self.failed.append(BatchOutput(number, error=error))

    def _prepare(
        self, probe: np.ndarray | None, kwargs: dict[str, Any], each: list[int] | None
    ) -> tuple[Tensor, StoppingCriteriaList, Choosing | None, Callable[[int, int], int]]:
        """Stop tokens [S], criteria, what chooses, and how many new tokens a prompt gets, by its number and length."""
        _refuse(kwargs, getattr(self.model, "generation_config", None))
        ids = torch.from_numpy(np.zeros(1, dtype=np.int64) if probe is None else probe)[None].to(self.model.device)
        asked = {**kwargs, "attention_mask": torch.ones_like(ids), "return_dict_in_generate": None}
        asked["tokenizer"] = self.tokenizer
        if each is not None:
            asked["max_new_tokens"] = max(each, default=1)
        mask = self.options.mask_token_id
        ids, settings = settings_of(self.model, ids, asked, mask, stacklevel=4)
        _refuse_of_one_batch(settings.get("logits_processor", ()), settings.get("stopping_criteria", ()))
        call = prepared(self.model, ids, settings)
        config, choosing = call.config, choosing_of(self.model, call, mask)
        padding = config._pad_token_tensor
        self.filler = 0 if padding is None else int(padding)
        if choosing is not None and config.min_new_tokens and config._eos_token_tensor is not None:
            # transformers says the same once more as the length of a text, which is the probe's.
            said = MinTokens(ids.shape[1] + config.min_new_tokens, numbers(config._eos_token_tensor), in_all=True)
            left = tuple(x for x in choosing.processors if x != said or x.own != said.own)
            choosing = replace(choosing, processors=left)
        whole, limit = "max_new_tokens" not in settings and "max_length" in settings, config.max_length
        most = limit - ids.shape[1]
        longest = [x.max_length for x in of_kind(settings.get("stopping_criteria", ()), MaxLengthCriteria)]

        def new(number: int, length: int) -> int:
            if longest:  # takes the place of all other limits, as in `generate`
                return max(1, min(longest) - length)
            if each is not None:
                return each[number]
            return limit - length if whole else most

        return stop_ids_of(call.criteria), call.criteria, choosing, new

    def _jobs(self, prompts: list[np.ndarray | None], new: Callable[[int, int], int]) -> list[Job]:
        """Those that can be decoded, in the order in which they will be; the others fail."""
        slots, stops = min(self.batch_size, len(prompts)), tuple(self.stop_ids.tolist())
        jobs = []
        for number, ids in enumerate(prompts):
            if ids is None:
                continue
            asked = new(number, len(ids))
            if asked < 1:
                error = f"max_length={len(ids) + asked} leaves a prompt of {len(ids)} tokens no new one; raise it"
                self._fail(number, ValueError(f"{error}, or pass max_new_tokens"))
                continue
            job = Job(number, ids, asked, choosing=self.choosing, stop_ids=stops)
            positions = learned_positions(self.model, needed=job.tokens - 1)
            if positions is not None:
                job = replace(job, new=positions - len(ids) + 1, asked=asked)
            if job.new < 1:
                assert positions is not None
                self._fail(number, ValueError(past_positions(self.model, positions, len(ids), asked)))
                continue
            jobs.append(job)
        longest = sorted(jobs, key=lambda job: -job.tokens)
        kept = kept_bytes(self.model.device)
        for job in list(longest):
            try:
                require_room(self.model, slots, job.tokens, scratch=self.options.strategy_of(slots).masks, kept=kept)
                break
            except ValueError as error:
                self._fail(job.number, error)
                longest.remove(job)
        return longest if self.order == "longest" else sorted(longest, key=lambda job: job.number)

    def run(self, emit: Callable[[BatchOutput], object], closed: Event | None = None) -> None:
        """Decode all; each output is told as soon as it is known, in the thread of the run."""
        for output in self.failed:
            emit(output)
        waiting = {job.number: job for job in self.jobs}

        def told(output: BatchOutput) -> None:
            del waiting[output.index]
            emit(output)

        slots = self.batch_size
        while waiting and not (closed is not None and closed.is_set()):
            slots = min(slots, len(waiting))
            try:
                jobs = list(waiting.values())
                tokens, new = max(job.tokens for job in jobs), max(job.new for job in jobs)
                self.decode(jobs, told, slots=slots, tokens=tokens, new=new, closed=closed)
                continue
            except Exception as error:
                slots = slots_of_next_try(error, slots, self.model, "mtpkern.generate_batch", "batch_size")
                if not slots:
                    raise
            # What has not ended begins anew, outside of the handler, whose traceback holds on to what was allocated.

    @ended_by_interrupts
    def decode(
        self,
        jobs: Iterable[Job],
        emit: Callable[[BatchOutput], object],
        *,
        slots: int,
        tokens: int,
        new: int,
        closed: Event | None = None,
        watched: bool = False,
        of_all: tuple[Choosing | None, Tensor | None] | None = None,
    ) -> None:
        """Decode jobs of so many tokens, and new ones, at most, until there are none.

        of_all: the choosing that does for all of them, and the key of their draws, where these are not the call's.
        """
        model = self.model
        choosing, key = of_all or (self.choosing, self.key)
        with (
            exclusive(model, wait=self.options.wait),
            evaluating(model),
            torch.accelerator.device_index(model.device.index),
            decoder_for(
                model,
                self.options.strategy_of(slots),
                self.stop_ids.to(model.device, non_blocking=True),
                tokens=tokens,
                max_new_tokens=new,
                prefill=partial(vacate, key=key, first=self.first),
                batch=slots,
                choosing=choosing,
                **self.options.of_decoder(on_host=bool(choosing and choosing.on_host)),
            ) as decoder,
        ):
            decoder.max_passes = sys.maxsize
            how = {"reuse": self.reuse, "criteria": self.criteria, "watched": watched, "closed": closed}
            chunk = self.options.prefill_chunk
            poll = Slots(decoder, jobs, emit, tokenizer=self.tokenizer, chunk=chunk, **how)
            poll.fill()
            with routed(model, decoder.cache) as route:
                decoder.run(route, poll)
            poll.deliver(wait=True)


def slots_of_next_try(error: BaseException, slots: int, model: PreTrainedModel, who: str, smaller: str) -> int:
    """How many slots a run has that begins anew behind this error of one with so many; 0 where it would fail again.

    What may help are memory that earlier calls have kept, fewer slots and plain torch in the place of our kernels. The
    last two are announced by a RuntimeWarning; who: goes on with them. smaller: the options that make the first stop.
    """
    if not isinstance(error, torch.OutOfMemoryError):
        return slots if isinstance(error, Exception) and without_kernels(error, model.device) else 0
    if release_graphs():
        return slots
    if slots > 1:
        warnings.warn(
            f"memory does not suffice for {slots} sequences side by side, so {who} goes on with {slots // 2}; a "
            f"smaller {smaller} ends this warning: {first_line(error)}",
            RuntimeWarning,
            stacklevel=2,
        )
    return slots // 2


def _seed_of(seed: Any) -> int:
    """What torch takes for a seed."""
    number = whole_number("seed", seed)
    if not -(1 << 63) <= number < 1 << 64:
        raise ValueError(f"seed must have 64 bits, as torch's seeds have, got {number}")
    return number


def _limits(max_new_tokens: Any, prompts: int) -> list[int] | None:
    """New tokens of each prompt, where the call tells."""
    if max_new_tokens is None:
        return None
    if isinstance(max_new_tokens, (Tensor, np.ndarray)) and max_new_tokens.ndim:
        max_new_tokens = max_new_tokens.tolist()
    if not isinstance(max_new_tokens, (list, tuple)):
        return [whole_number("max_new_tokens", max_new_tokens, least=1)] * prompts
    if len(max_new_tokens) != prompts:
        raise ValueError(
            f"max_new_tokens must be one number for all prompts or one for each, got {len(max_new_tokens)} numbers for "
            f"{prompts} prompts"
        )
    return [whole_number("max_new_tokens", x, least=1) for x in max_new_tokens]


def _refuse(kwargs: dict[str, Any], file: GenerationConfig | None) -> None:
    """Refuse by name what `generate` may know and is not honoured here."""
    asked = {n: value for n, value in asked_by(kwargs.get("generation_config"), file).items() if n in FIELDS}
    asked |= {name: value for name, value in kwargs.items() if name != "generation_config"}
    bad = {n: v for n, v in asked.items() if n not in _HONOURED and not (n in FIELDS and inert(n, v)) and v is not None}
    if bad:
        values = ", ".join(f"{name}={value!r:.60}" for name, value in bad.items())
        arguments = {name for f in (generate, GenerationMixin.generate) for name in signature(f).parameters}
        unknown = not bad.keys() & (FIELDS | arguments | _OF_MODELS)
        why = "which nobody knows" if unknown else "which is no matter of each prompt alone"
        remedy = "leave it out, or mend its name" if unknown else "leave it out, or use mtpkern.generate"
        raise ValueError(f"{entry()} does not support {values}, {why}; {remedy}")


def _refuse_of_one_batch(processors: Iterable[Any], criteria: Iterable[Any]) -> None:
    """Refuse by name what is made for the prompts of one call of `generate`."""
    for processor in processors:
        if type(processor) in _OF_ONE_LENGTH:
            raise ValueError(
                f"{entry()} does not support the logits processor {type(processor).__name__}, which is "
                "made for prompts of one length; pass the field of generate that makes it (min_new_tokens, "
                "begin_suppress_tokens), or use mtpkern.generate"
            )
    if any(isinstance(criterion, MaxTimeCriteria) for criterion in criteria):
        raise ValueError(
            f"{entry()} does not support MaxTimeCriteria, whose clock runs for all prompts and not for each alone; "
            "leave it out, or read the answers as they come, by mtpkern.iterate_batch or Engine.stream, and leave when "
            "the time is over"
        )
