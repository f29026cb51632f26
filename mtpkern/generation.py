"""generate(): what `model.generate` does, several tokens a pass.

transformers prepares everything (configuration, limits, stop tokens, padding), as for its own decoding; what cannot be
honoured here is refused by name before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, GenerationMixin, MaxLengthCriteria

from mtpkern.attention import exclusive, routed
from mtpkern.decoder import PREFILL_CHUNK, Decoder, places_for
from mtpkern.graph import is_kept, kept_bytes, kept_decoder, release_graphs, wants_graph, without_kernels
from mtpkern.kernels.advance import FAULT, STOPPED
from mtpkern.memory import fits_at_once, require_room
from mtpkern.model import recorded_settings, require_decodable, resolve_mask_token
from mtpkern.strategies import Strategy, Verified
from mtpkern.verify import require_verified
from mtpkern.wrappers import unwrapped

# Capacities are rounded up, so that runs of similar length share their shapes.
_CAPACITY_STEP = 16

# Fields of GenerationConfig that are honoured, or that say nothing where nothing is sampled or searched.
_HONOURED = {
    *("max_length", "max_new_tokens", "eos_token_id", "pad_token_id", "bos_token_id", "return_dict_in_generate"),
    *("transformers_version", "use_cache", "disable_compile"),
}
_ONLY_WITH_SAMPLING = {
    *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
}


@dataclass
class MTPGenerateOutput(GenerateDecoderOnlyOutput):
    """`GenerateDecoderOnlyOutput` with the record of acceptance; one entry per sequence in each list.

    blocks: tokens emitted by each pass, the prefill being the first. passes: their number. tokens_per_pass: tokens
    emitted / passes, the prefill counted. finish_reasons: "stop" at a stop token, "length" at the limit.
    """

    blocks: list[list[int]] | None = None
    passes: list[int] | None = None
    tokens_per_pass: list[float] | None = None
    finish_reasons: list[str] | None = None


def default_strategy(model: PreTrainedModel) -> Strategy:
    """Verified, with no more predictions than training has recorded: `default_strategy(model).k`."""
    return Verified(k=min(recorded_settings(model).get("k_max", Verified.k), Verified.k))


def generate(
    model: PreTrainedModel,
    input_ids: Tensor | None = None,
    *,
    strategy: Strategy | None = None,
    mask_token_id: int | None = None,
    rows: int | None = None,
    use_graph: bool | None = None,
    compile: bool = False,
    batch_invariant: bool = False,
    prefill_chunk: int = PREFILL_CHUNK,
    wait: bool = True,
    check_model: bool = True,
    **kwargs: Any,
) -> Tensor | MTPGenerateOutput:
    """Generate from left-padded prompts input_ids [B, T]; returns [B, T + new] token ids, right-padded.

    A drop-in for greedy `model.generate(input_ids, **kwargs)`: attention_mask, max_new_tokens, max_length,
    eos_token_id (one or several), pad_token_id, generation_config and return_dict_in_generate mean what they mean
    there. With return_dict_in_generate=True the result is an `MTPGenerateOutput`.

    strategy: `Verified` (default; the checkpoint's own greedy output), `ConfAdapt` or `Static`. Its k is at most the
        k_max that training has recorded, where none is given.
    mask_token_id: for checkpoints that do not record theirs.
    rows: the row budget of a pass, from B * k up; see `mtpkern.decoder.default_rows`.
    use_graph: whether a pass is captured in a CUDA graph, which the next calls of a similar shape use again; None: on
        every CUDA device. What is kept between calls: `release_graphs`.
    compile: send the model's forward through `torch.compile`. Off, until a GPU has measured that it pays.
    batch_invariant: no bit of the attention depends on what else is in the batch; the model's matrix products still
        depend on the number of rows.
    prefill_chunk: most prompt tokens that the model sees at once, over the whole batch; bounds the memory that long
        prompts take, and changes no token.
    wait: whether a call waits for another thread's that runs the same model; False: RuntimeError.
    check_model: compare a model of a class that the tests do not cover with its own forward and greedy decoding, once
        in a process, and refuse it with what differs; see `mtpkern.check`.

    model may be a PeftModel whose adapters act in its layers, row by row.

    Raises ValueError, by name, for everything that is not honoured: sampling, beams, logits processors, stop strings,
    streamers, scores, a model of an unknown kind. RuntimeError where the model's logits hold NaN.

        output = mtpkern.generate(model, **tokenizer("Two and two is", return_tensors="pt"), max_new_tokens=64)
        print(tokenizer.decode(output[0]))
    """
    if strategy is None:
        strategy = default_strategy(model)
    elif not isinstance(strategy, Strategy):
        raise TypeError(f"strategy must be mtpkern.Static, ConfAdapt or Verified, got {strategy!r}")
    model = unwrapped(model, kwargs)
    require_decodable(model)
    mask = resolve_mask_token(model, mask_token_id)
    graph = wants_graph(use_graph, model.device)
    if prefill_chunk < 1:
        raise ValueError(f"prefill_chunk must be at least one token, got {prefill_chunk}; leave it out")
    if input_ids is None:
        input_ids = kwargs.pop("inputs", None)
    _refuse_arguments(kwargs)
    if not isinstance(input_ids, Tensor):
        raise TypeError(
            f"input_ids must be a tensor [B, T], got {type(input_ids).__name__}; unpack encodings: **inputs"
        )
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids must be [B, T] with at least one token, got shape {list(input_ids.shape)}")

    def decode(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | MTPGenerateOutput:
        if not model_kwargs.get("mm_encoder_outputs", True):
            del model_kwargs["mm_encoder_outputs"]  # of a model that could see images, and has been given none
        # Again, because the model's own generation_config has come in.
        _refuse_settings(vars(generation_config))
        _refuse_prepared(logits_processor, stopping_criteria, model_kwargs)
        run = partial(
            _decode,
            model,
            input_ids,
            strategy,
            generation_config,
            model_kwargs.get("attention_mask"),
            mask_token_id=mask,
            use_graph=graph,
            prefill_chunk=prefill_chunk,
            wait=wait,
            check_model=check_model,
            rows=rows,
            compile=compile,
            batch_invariant=batch_invariant,
        )
        try:
            return run()
        except Exception as error:
            if not without_kernels(error, model.device):
                raise
        return run()

    # Not through the instance, whose generate may be this function.
    return GenerationMixin.generate(model, input_ids, custom_generate=decode, **kwargs)


def _decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    strategy: Strategy,
    generation_config: GenerationConfig,
    attention_mask: Tensor | None,
    *,
    mask_token_id: int,
    use_graph: bool,
    prefill_chunk: int,
    wait: bool,
    check_model: bool,
    **options: Any,
) -> Tensor | MTPGenerateOutput:
    # The host looks at the prompts once: up to two copies to it, or from it, before anything runs.
    host_ids, host_mask = input_ids.cpu(), None if attention_mask is None else attention_mask.to("cpu", torch.int64)
    _require_prompts(host_ids, host_mask, mask_token_id)
    B, T = input_ids.shape
    prompts = [T] * B if host_mask is None else host_mask.sum(1).tolist()
    if min(prompts) == T:
        attention_mask = None  # without padding transformers need not look for it
    input_ids = input_ids.to(model.device, torch.int64)
    if attention_mask is not None:
        attention_mask = attention_mask.to(model.device, torch.int64)
    stop_ids = _stop_ids(generation_config)
    max_new_tokens = generation_config.max_length - T
    # The prefill runs through the model's own attention, and the results are read before another run may have the
    # decoder.
    with (
        exclusive(model, wait=wait),
        torch.accelerator.device_index(model.device.index),
        _decoder(
            model,
            strategy,
            stop_ids,
            tokens=generation_config.max_length,
            max_new_tokens=max_new_tokens,
            mask_token_id=mask_token_id,
            use_graph=use_graph,
            check_model=check_model,
            batch=B,
            **options,
        ) as decoder,
    ):
        _prefill(decoder, input_ids, attention_mask, prefill_chunk)
        with routed(model, decoder.cache) as route:
            decoder.run(route)
        sequences = decoder.sequences
        # One copy to the host, behind all passes.
        status, length, passes = torch.stack([sequences.status, sequences.length, sequences.passes]).tolist()
        faulty = [b for b, s in enumerate(status) if s == FAULT]
        if faulty:
            raise RuntimeError(
                f"the model's logits hold NaN or inf for sequences {faulty}; check its weights and dtype"
            )
        emitted = [end - start for end, start in zip(length, prompts)]
        new = _new_tokens(decoder, attention_mask, T, max(emitted), generation_config._pad_token_tensor)
        output = torch.cat([input_ids, new], dim=1)
        if not generation_config.return_dict_in_generate:
            return output
        blocks = sequences.blocks[:, : max(passes)].tolist()
    return MTPGenerateOutput(
        sequences=output,
        blocks=[row[:n] for row, n in zip(blocks, passes)],
        passes=passes,
        tokens_per_pass=[n / p for n, p in zip(emitted, passes)],
        finish_reasons=["stop" if s == STOPPED else "length" for s in status],
    )


@contextmanager
def _decoder(
    model: PreTrainedModel,
    strategy: Strategy,
    stop_ids: Tensor,
    *,
    tokens: int,
    max_new_tokens: int,
    mask_token_id: int,
    use_graph: bool,
    check_model: bool,
    **options: Any,
) -> Iterator[Decoder]:
    """A decoder that is ready to run, for a model that decodes right and where there is room for it.

    With a graph one that an earlier call has left, or that is kept for the next.
    """
    if check_model:
        require_verified(model, mask_token_id)

    def shape(capacity: int) -> dict[str, Any]:
        return {"capacity": capacity, "mask_token_id": mask_token_id, **options}

    def make(use_graph: bool) -> Decoder:
        return Decoder(
            model,
            strategy,
            stop_ids=stop_ids,
            max_new_tokens=max_new_tokens,
            use_graph=use_graph,
            **shape(_capacity(tokens, use_graph)),
        )

    capacity = _capacity(tokens, use_graph)
    key = (strategy.k, strategy.verify, places_for(stop_ids), *shape(capacity).values())
    if not (use_graph and is_kept(model, key)):
        require_room(model, options["batch"], tokens, kept=kept_bytes(model.device))
        use_graph = use_graph and fits_at_once(model, options["batch"], capacity)
    if not use_graph:
        yield make(False)
        return
    with kept_decoder(model, key, partial(make, True)) as decoder:
        decoder.restart(strategy, stop_ids, max_new_tokens)
        yield decoder


def _capacity(tokens: int, use_graph: bool) -> int:
    """Slots for so many tokens. With a graph two sizes per octave, from 256, so that calls share theirs."""
    step = max(256, 1 << (tokens - 1).bit_length() >> 2) if use_graph else _CAPACITY_STEP
    return -(-tokens // step) * step


def _prefill(decoder: Decoder, input_ids: Tensor, attention_mask: Tensor | None, chunk: int) -> None:
    """Run the prefill; where memory is short, once more without what earlier calls have kept."""
    try:
        decoder.prefill(input_ids, attention_mask, chunk=chunk)
        return
    except torch.OutOfMemoryError:
        if not release_graphs():
            raise
    # Outside of the handler, whose traceback holds on to what the first attempt has allocated.
    decoder.prefill(input_ids, attention_mask, chunk=chunk)


def _new_tokens(decoder: Decoder, attention_mask: Tensor | None, T: int, width: int, padding: Tensor | None) -> Tensor:
    """From compact sequences (slot = position) back to what stands behind the prompts: [B, width], padded."""
    sequences = decoder.sequences
    prompt = torch.full_like(sequences.length, T) if attention_mask is None else attention_mask.sum(1)
    o_new = prompt[:, None] + torch.arange(width, device=decoder.device)
    new = sequences.tokens.gather(1, o_new)
    return new.masked_fill(o_new >= sequences.length[:, None], 0 if padding is None else padding)


def _stop_ids(generation_config: GenerationConfig) -> Tensor:
    """Stop tokens [S]; -1, which is no token, where there is none."""
    stops = generation_config._eos_token_tensor
    return torch.tensor([-1]) if stops is None else torch.as_tensor(stops).flatten()


def _require_prompts(input_ids: Tensor, attention_mask: Tensor | None, mask_token_id: int) -> None:
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids {tuple(input_ids.shape)}, got "
                f"{tuple(attention_mask.shape)}"
            )
        if (attention_mask.diff(dim=1) < 0).any() or not attention_mask[:, -1].all():
            raise ValueError("prompts must be padded on the left: set tokenizer.padding_side = 'left'")
    # Left padding may consist of any id; a mask token among the words would be read as a question.
    words = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, -1)
    if (words == mask_token_id).any():
        raise ValueError(f"the prompt holds the mask token {mask_token_id}, which stands for a token to be predicted")


_REFUSED_ARGUMENTS = (
    *("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "assistant_model", "streamer"),
    *("negative_prompt_ids", "negative_prompt_attention_mask", "custom_generate", "past_key_values"),
    *("position_ids", "inputs_embeds", "tokenizer", "assistant_tokenizer", "logits_to_keep", "cache_implementation"),
)


def _refuse_arguments(kwargs: dict[str, Any]) -> None:
    """Refuse what transformers would digest, or reject in words of its own, before we could see it."""
    for name in _REFUSED_ARGUMENTS:
        value = kwargs.get(name)
        if value is not None and not (isinstance(value, list) and not value):
            raise ValueError(f"mtpkern.generate does not support {name}; leave it out, or use model.generate")
    if kwargs.get("synced_gpus"):
        raise ValueError("mtpkern.generate does not support synced_gpus; gather the model on one device")
    generation_config = kwargs.get("generation_config")
    _refuse_settings({**(vars(generation_config) if generation_config is not None else {}), **kwargs})


def _refuse_settings(settings: dict[str, Any]) -> None:
    """Refuse every setting of a generation config that would change the output and is not honoured."""
    if settings.get("do_sample"):
        raise ValueError("mtpkern.generate is greedy: pass do_sample=False, or use model.generate to sample")
    if settings.get("use_cache") is False:
        raise ValueError("mtpkern.generate always caches keys and values: leave out use_cache=False")
    defaults = GenerationConfig._get_default_generation_params()
    refused = []
    for name in vars(GenerationConfig()):
        if name in _HONOURED or name in _ONLY_WITH_SAMPLING or name.startswith("_"):
            continue
        value = settings.get(name)
        if value is not None and value is not False and value != defaults.get(name):
            refused.append(f"{name}={value!r}")
    if refused:
        raise ValueError(
            f"mtpkern.generate does not support {', '.join(refused)}; leave it out of the call and of the model's "
            "generation_config, or use model.generate"
        )


def _refuse_prepared(
    logits_processor: LogitsProcessorList, stopping_criteria: StoppingCriteriaList, model_kwargs: dict[str, Any]
) -> None:
    """Refuse what transformers has made of the call, where it would change the output and is not honoured."""
    for what, items, known in (
        ("logits processor", logits_processor, ()),
        ("stopping criterion", stopping_criteria, (MaxLengthCriteria, EosTokenCriteria)),
    ):
        for item in items:
            if not isinstance(item, known):
                raise ValueError(f"mtpkern.generate does not support the {what} {type(item).__name__}")
    honoured = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
    for name, value in model_kwargs.items():
        if name not in honoured and value is not None and value is not False:
            raise ValueError(f"mtpkern.generate does not support the model argument {name}; leave it out")
