"""generate(): what `model.generate` does, several tokens a pass.

transformers prepares everything (configuration, limits, stop tokens, padding), as for its own decoding; what cannot be
honoured here is refused by name before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    SuppressTokensLogitsProcessor,
)

from mtpkern.adapter import adopt
from mtpkern.arguments import (
    read_arguments,
    require_bool,
    require_prepared,
    require_prompts,
    require_streamer,
    warn_of_left_out,
)
from mtpkern.attention import ended_by_interrupts, exclusive, routed
from mtpkern.choosing import Choosing
from mtpkern.decoder import PREFILL_CHUNK, Decoder
from mtpkern.graph import without_kernels
from mtpkern.host import on_host
from mtpkern.model import evaluating, learned_positions
from mtpkern.options import Options
from mtpkern.parallel import require_same_on_all
from mtpkern.pool import decoder_for, prefill_with_room
from mtpkern.prefix_cache import PrefixCache, Reuse, require_prefix_cache
from mtpkern.readers import telling
from mtpkern.strategies import Strategy
from mtpkern.watch import REASONS, Streamer, Watch, first_tokens, of_kind
from mtpkern.wrappers import unwrapped


@dataclass
class MTPGenerateOutput(GenerateDecoderOnlyOutput):
    """`GenerateDecoderOnlyOutput` with the record of acceptance; one entry per sequence in each list.

    blocks: tokens emitted by each pass, the prefill being the first. passes: their number. tokens_per_pass: tokens
    emitted / passes, the prefill counted. finish_reasons: "stop" at a stop token, "stop_string", "criteria" where one
    of stopping_criteria says so, "time" behind max_time, "length" at the limit, "closed" where a reader of
    `mtpkern.stream` has left. Tokens and passes behind the end count nowhere.

    With return_logprobs=True, [B, new] float32 on the model's device: logprobs, of each new token in the model's own
    distribution, before any processor and without the mask token; confidences, the largest probability of the
    distribution that it was chosen from. 0 and 1 behind a sequence's end.
    """

    blocks: list[list[int]] | None = None
    passes: list[int] | None = None
    tokens_per_pass: list[float] | None = None
    finish_reasons: list[str] | None = None
    logprobs: Tensor | None = None
    confidences: Tensor | None = None


def generate(
    model: PreTrainedModel,
    input_ids: Tensor | None = None,
    *,
    strategy: Strategy | None = None,
    mask_token_id: int | None = None,
    rows: int | None = None,
    use_graph: bool | None = None,
    compile: bool | None = None,
    batch_invariant: bool = False,
    prefill_chunk: int = PREFILL_CHUNK,
    wait: bool = True,
    check_model: bool = True,
    streamer: Streamer | None = None,
    return_logprobs: bool = False,
    prefix_cache: PrefixCache | None = None,
    **kwargs: Any,
) -> Tensor | MTPGenerateOutput:
    """Generate from left-padded prompts input_ids [B, T]; returns [B, T + new] token ids, right-padded.

    A drop-in for `model.generate(input_ids, **kwargs)` without beams: attention_mask, max_new_tokens, max_length,
    eos_token_id (one or several), pad_token_id, stop_strings (with tokenizer), stopping_criteria, generation_config,
    penalties and other logits processors, and return_dict_in_generate mean what they mean there; max_time ends behind
    the pass that exceeds it. With return_dict_in_generate=True the result is an `MTPGenerateOutput`. Greedy unless the
    call says do_sample=True, whatever the model's own generation_config says: of it the limits, stop strings and token
    ids count, and how it samples in a call that does (`mtpkern.arguments`).

    do_sample=True draws from the distribution that `model.generate` draws from (`mtpkern.choosing`). `Verified` and
        `Static(1)` do so exactly; `ConfAdapt` draws where it is not sure and takes the argmax where it is; `Static(k)`
        draws each of its k tokens without knowing those before it. `torch.manual_seed` in front of a call makes it
        reproducible; of the strategy, rows and neighbours the draws of the exact ones are independent.

    strategy: `Verified` (default; the checkpoint's own greedy output), `ConfAdapt` or `Static`. Without a k each takes
        one from the k_max that training has recorded (`Strategy.for_model`); one that is given stays. So does a
        threshold; without k and threshold, on a CPU, `Verified`'s follows what drafts have been worth.
    mask_token_id: for checkpoints that do not record theirs; k = 1 needs none, so any model decodes with `Static(1)`.
    rows: the row budget of a pass, from B * k up, with `Verified` from B up. None: for a `Verified` without a k, as
        many as are worth their time (`mtpkern.load`), else `mtpkern.load.default_rows`: all it can use, for
        `Verified` on a GPU those that are nearly free. By load the passes, and in near-ties the last bits of logits,
        may differ from run to run on a CPU; a k or a number of rows fixes them.
    use_graph: whether a pass is captured in a CUDA graph, which the next calls of a similar shape use again; None: on
        every CUDA device. What is kept between calls: `release_graphs`.
    compile: send the model's layers through `torch.compile`, for passes alone (`mtpkern.layers`). The first call of a
        batch and strategy then takes 4 to 8 seconds longer, for a few forms that all layers and later calls share, and
        a pass half to two thirds of the time. None: wherever a pass is captured; False for a single short call.
    batch_invariant: no bit of the attention depends on what else is in the batch; the model's matrix products still
        depend on the number of rows.
    prefill_chunk: most prompt tokens that the model sees at once, over the whole batch; bounds the memory that long
        prompts take, and changes no token.
    wait: whether a call waits for another thread's that runs the same model; False: RuntimeError.
    check_model: compare a model of a class that the tests do not cover with its own forward and greedy decoding, once
        in a process, and refuse it with what differs; see `mtpkern.check`.
    streamer: as transformers': gets the prompts, then one token of each sequence at a time, as soon as all have come
        that far. `mtpkern.stream` is another way, by blocks. Who reads a TextIteratorStreamer raises what the call
        raises, where transformers' has them wait; another streamer hears of it by a `fail(error)`, if it has one.

    return_logprobs: with return_dict_in_generate=True, log-probability and confidence of every new token.
    prefix_cache: a `PrefixCache` that several calls are given: what a prompt shares with a text of the last call, its
        answer included, is not read again; an example stands there. Takes the place of transformers' past_key_values.

    model may be a PeftModel whose adapters act in its layers, row by row. In training mode it decodes as in evaluation,
    where nothing in it drops at random, and is left in the mode that it was in.

    Raises ValueError or TypeError, by name, for everything in the call that is not honoured (docs/arguments.md):
    beams, logits processors that are no functions of the text, a model of an unknown kind. RuntimeError where the
    model's logits hold NaN. Warns of what the model's own generation_config asks for and greedy decoding leaves out.

        output = mtpkern.generate(model, **tokenizer("Two and two is", return_tensors="pt"), max_new_tokens=64)
        print(tokenizer.decode(output[0]))
    """
    given = dict(locals())  # the arguments by name: nothing else is bound yet
    if getattr(kwargs.get("custom_generate"), "__module__", None) == __name__:
        # Our own call has come back, through a class's generate that leads here.
        kwargs.setdefault("inputs", input_ids)
        return GenerationMixin.generate(model, **kwargs)
    with telling(streamer):
        adopt(model)
        model = unwrapped(model, kwargs)
        options = Options(model, given)
        require_bool("return_logprobs", return_logprobs)
        require_streamer(streamer)
        require_prefix_cache(prefix_cache, model)
        input_ids, settings = settings_of(model, input_ids, kwargs, options.mask_token_id, stacklevel=2)
        require_same_on_all(model, settings.get("max_time"), settings.get("stopping_criteria", ()))

        def decode(call: Prepared) -> Tensor | MTPGenerateOutput:
            choosing = choosing_of(model, call, options.mask_token_id, return_logprobs)
            run = partial(_decode, model, call, options, Watch.of(streamer, call.criteria), choosing, prefix_cache)
            try:
                return run()
            except Exception as error:
                # Where a Triton kernel does not compile on this device, once more by the torch forms.
                if not without_kernels(error, model.device):
                    raise
            return run()

        return _prepared_by_theirs(model, input_ids, settings, decode)


class Prepared(NamedTuple):
    """A call as transformers prepares it: prompts [B, T], processors, criteria, settings, mask [B, T]."""

    input_ids: Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    attention_mask: Tensor | None


def settings_of(
    model: PreTrainedModel, input_ids: Tensor | None, kwargs: dict[str, Any], mask_token_id: int, *, stacklevel: int
) -> tuple[Tensor, dict[str, Any]]:
    """Prompts and arguments for transformers' generate; warns of what the model's own file asks for in vain."""
    input_ids, settings, left_out = read_arguments(model.generation_config, input_ids, kwargs)
    if left_out.get("suppress_tokens") == [mask_token_id]:
        del left_out["suppress_tokens"]  # as training records it for other decoders; ours never emits it
    warn_of_left_out(type(model).__name__, left_out, stacklevel=stacklevel + 1)
    return input_ids, settings


def _prepared_by_theirs(
    model: PreTrainedModel, input_ids: Tensor, settings: dict[str, Any], decode: Callable[[Prepared], Any]
) -> Any:
    """Have transformers' generate prepare the call, with `decode` in the place of its loop (its custom_generate)."""
    reached = False

    def ours(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        nonlocal reached
        reached = True
        if not model_kwargs.get("mm_encoder_outputs", True):
            del model_kwargs["mm_encoder_outputs"]  # of a model that could see images, and has been given none
        require_prepared(generation_config, model_kwargs)
        mask = model_kwargs.get("attention_mask")
        return decode(Prepared(input_ids, logits_processor, stopping_criteria, generation_config, mask))

    # Not through the instance, whose generate may be `mtpkern.generate`. A class's own is called, and what it does
    # around the call is done; it has to lead to transformers'.
    output = type(model).generate(model, input_ids, custom_generate=ours, **settings)
    if not reached:
        raise ValueError(
            f"{type(model).__name__}.generate decodes in its own way and hands nothing on to transformers' generate, "
            "so mtpkern cannot take its place; use model.generate"
        )
    return output


@ended_by_interrupts
def _decode(
    model: PreTrainedModel,
    call: Prepared,
    options: Options,
    watch: Watch | None,
    choosing: Choosing | None,
    prefix_cache: PrefixCache | None,
) -> Tensor | MTPGenerateOutput:
    input_ids, _, stopping_criteria, generation_config, attention_mask = call
    # The host looks at the prompts once, before anything runs.
    given_on, padding = input_ids.device, generation_config._pad_token_tensor
    padding = torch.zeros(1, dtype=torch.int64) if padding is None else padding
    told = [padding, *([] if attention_mask is None else [attention_mask])]
    host_ids, pad, *mask = on_host(input_ids, *told)
    filler, host_mask = int(pad), mask[0] if mask else None
    vocabulary = model.get_input_embeddings().weight.shape[0]
    require_prompts(host_ids, host_mask, mask_token_id=options.mask_token_id, vocabulary=vocabulary)
    B, T = input_ids.shape
    lengths = [T] * B if host_mask is None else host_mask.long().sum(1).tolist()  # of the prompts
    if min(lengths) == T:
        attention_mask = None  # without padding transformers need not look for it
    input_ids = input_ids.to(model.device, torch.int64, non_blocking=True)
    if attention_mask is not None:
        attention_mask = attention_mask.to(model.device, torch.int64, non_blocking=True)
    stop_ids = stop_ids_of(stopping_criteria).to(model.device, non_blocking=True)
    # Criteria of the caller's for these two stand in the place of those of the configuration.
    limit = min(criterion.max_length for criterion in of_kind(stopping_criteria, MaxLengthCriteria))
    longest, asked = max(lengths), max(1, limit - T)
    max_new_tokens = asked
    positions = learned_positions(model, needed=longest + asked - 1)  # the last token is never fed
    if positions is not None:
        # As theirs: an answer that stops in time is as good as any, one that does not is an error, once it is there.
        max_new_tokens = positions - longest + 1
        if max_new_tokens < 1:
            raise ValueError(past_positions(model, positions, longest, asked))
    reuse = None
    if prefix_cache is not None:
        reuse = Reuse(prefix_cache, model, [row[T - n :].numpy() for row, n in zip(host_ids.long(), lengths)])
    if watch is not None:
        watch.begin(host_ids, host_mask, new=max_new_tokens, padding=filler, device=given_on)
    prompt: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "chunk": options.prefill_chunk}
    prompt["known"] = None if reuse is None else reuse.fill
    # The prefill goes through the model's own attention: `decoder_for` runs it, in front of `routed`. The results are
    # read inside, before another run may have the decoder.
    with (
        exclusive(model, wait=options.wait),
        evaluating(model),
        torch.accelerator.device_index(model.device.index),
        decoder_for(
            model,
            options.strategy_of(B),
            stop_ids,
            tokens=T + max_new_tokens,
            max_new_tokens=max_new_tokens,
            prefill=partial(prefill_with_room, **prompt),
            batch=B,
            choosing=choosing,
            **options.of_decoder(on_host=bool(choosing and choosing.on_host)),
        ) as decoder,
    ):
        sequences = decoder.sequences
        poll = decoder.poll() if watch is None else watch.poll(sequences, options.strategy)
        with routed(model, decoder.cache) as route:
            decoder.run(route, poll)
        # One copy to the host, behind all passes; of their record as much as so many can have written.
        wanted = poll.polls + 1 if generation_config.return_dict_in_generate or reuse is not None else 0
        status, length, blocks = on_host(sequences.status, sequences.length, sequences.blocks[:, :wanted])
        if watch is None:
            ends = sequences.length
            emitted = (length - torch.tensor(lengths)).tolist()
            reasons = [REASONS[s] for s in status.tolist()]
        else:
            poll.finish()
            emitted, reasons = watch.ends, watch.reasons
            ends = torch.tensor([start + n for start, n in zip(lengths, emitted)]).to(model.device, non_blocking=True)
        faulty = [b for b, reason in enumerate(reasons) if reason == "fault"]
        if faulty:
            raise RuntimeError(faults_of(f"sequences {faulty}"))
        if positions is not None and "length" in reasons:
            raise ValueError(past_positions(model, positions, longest, asked))
        output = torch.cat([input_ids, _new_tokens(decoder, ends, attention_mask, T, max(emitted), filler)], dim=1)
        kept = [first_tokens(row, n) for row, n in zip(blocks.tolist(), emitted)]
        of_tokens = {} if decoder.choice is None else decoder.choice.of_tokens(ends, max(emitted), filler)
        if reuse is not None:
            # Of what the last pass has emitted there may be no keys.
            reuse.keep(decoder.cache, output[:, T:], [sum(row[:-1]) for row in kept])
    if watch is not None:
        watch.finish()
    if not generation_config.return_dict_in_generate:
        return output
    return MTPGenerateOutput(
        sequences=output,
        blocks=kept,
        passes=[len(row) for row in kept],
        tokens_per_pass=[n / len(row) for row, n in zip(kept, emitted)],
        finish_reasons=reasons,
        **of_tokens,
    )


def choosing_of(model: PreTrainedModel, call: Prepared, mask: int, logprobs: bool = False) -> Choosing | None:
    """What stands between logits and tokens; None where it is the argmax alone."""
    generation_config = call.config
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        forced = getattr(generation_config, name, None)
        if mask in (forced if isinstance(forced, (list, tuple)) else [forced]):
            raise ValueError(f"{name}={forced} asks for the mask token {mask}, which is never emitted; force another")
    keeps = {"logprobs"} if logprobs else set()
    if generation_config.return_dict_in_generate:
        keeps |= {name for name in ("scores", "logits") if getattr(generation_config, f"output_{name}", False)}
    elif logprobs:
        raise ValueError("return_logprobs needs return_dict_in_generate=True, which brings the object that holds them")
    # As training records it for other decoders; ours never emits it.
    alone = generation_config.suppress_tokens == [mask]
    wanted = [x for x in call.processors if not (alone and type(x) is SuppressTokensLogitsProcessor)]
    samples, T = bool(generation_config.do_sample), call.input_ids.shape[1]
    choosing = Choosing.of(wanted, T, samples=samples, keeps=frozenset(keeps))
    if choosing is not None:
        choosing.require_known(model.get_input_embeddings().weight.shape[0])
    return choosing


def prepared(model: PreTrainedModel, input_ids: Tensor, settings: dict[str, Any]) -> Prepared:
    """What transformers makes of a call with these settings, as `settings_of` returns them; nothing is decoded."""
    found: list[Prepared] = []

    def note(call: Prepared) -> Tensor:
        found.append(call)
        return call.input_ids

    _prepared_by_theirs(model, input_ids, settings, note)
    return found[0]


def faults_of(whom: str) -> str:
    """What is said of a sequence, or several, whose logits are not finite."""
    return (
        f"the model's logits hold NaN or inf for {whom}; check its weights and dtype, and whether processors leave any "
        "token"
    )


def past_positions(model: PreTrainedModel, positions: int, prompt: int, new: int) -> str:
    """What is said of a prompt whose text has come to no end within the positions that a model has learned."""
    return (
        f"{type(model).__name__} has learned {positions} positions, which must hold the text: got a prompt of {prompt} "
        f"tokens that has come to no end within them, with max_new_tokens={new} (max_length={prompt + new}); lower "
        "the limit or shorten the prompt"
    )


def _new_tokens(decoder: Decoder, ends: Tensor, mask: Tensor | None, T: int, width: int, filler: int) -> Tensor:
    """From compact sequences (slot = position) of these lengths [B] back to what stands behind the prompts: padded."""
    sequences = decoder.sequences
    prompt = torch.full_like(ends, T) if mask is None else mask.sum(1)
    o_new = prompt[:, None] + torch.arange(width, device=decoder.device)
    new = sequences.tokens.gather(1, o_new)
    return new.masked_fill(o_new >= ends[:, None], filler)


def stop_ids_of(stopping_criteria: StoppingCriteriaList) -> Tensor:
    """Stop tokens [S]; -1, which is no token, where there is none."""
    stops = [criterion.eos_token_id.flatten() for criterion in of_kind(stopping_criteria, EosTokenCriteria)]
    return torch.cat(stops) if stops else torch.tensor([-1])
