"""`mtpkern convert SRC DST`: a plain checkpoint of what is none: a GGUF, quantised weights, an adapter, or custom code.

The result is safetensors of floats, a tokenizer and a generation config, for which nothing is needed but transformers.

    source                         what becomes of it
    a .gguf file, or a folder      floats (--dtype: others than the file's own); tokenizer, chat template and stop
    with one                       tokens come out of the file
    quantised weights              floats, where transformers can turn them into such
    an adapter's folder, of LoRA   the base that it names, with what it adds merged
    and its kin
    the paper's published          the same weights with mask token, k_max and stop tokens recorded
    checkpoints (--preset)
    any other                      the same weights

Custom code is neither run nor kept: no *.py, and no auto_map in config or tokenizer. A source without a mask token is
given none: `mtpkern train` adds it. What the paper's authors published (arXiv 2602.06019) has the weights of an
ordinary Llama or Qwen3 beside custom code, and 32 tokens <|mtp_special_token_i|>, of which the first is the mask token;
neither that nor all the stop tokens stand in its configs.

    preset           mask token  stop tokens      prompts
    llama-magpie     128259      128009, 128001   chat template
    qwen3-4b         151669      151645, 151643   question and a blank line, no chat template
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtpkern.custom_generate import write_custom_generate
from mtpkern.loading import quiet
from mtpkern.train.arguments import refuse, require_one_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PUBLISHED_MASK = "<|mtp_special_token_0|>"
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Preset:
    """What the config of a published checkpoint leaves unsaid; prompts as `mtpkern.model.recorded_settings` says."""

    mask_token_id: int
    stop_token_ids: tuple[int, ...]
    prompts: dict[str, Any]
    k_max: int = 16


PRESETS = {
    "llama-magpie": Preset(128259, (128009, 128001), {"chat": True}),
    "qwen3-4b": Preset(151669, (151645, 151643), {"chat": False, "separator": "\n\n"}),
}


def convert(
    source: str,
    target: Path,
    *,
    preset: str | None = None,
    mask_token_id: int | None = None,
    stop_token_ids: Sequence[int] | None = None,
    k_max: int | None = None,
    dtype: str = "auto",
) -> int | None:
    """Write the checkpoint `source` (a path or hub id, or a GGUF) to the new folder `target`, whole or not at all.

    Returns the mask token's id: the argument, the preset's, what the source records, or else the tokenizer's
    <|mtp_special_token_0|>; None for a source that has none. Stop tokens are the argument, the preset's, or else those
    of the source. dtype: "auto", the weights' own, "float32", "bfloat16" or "float16".

    Raises FileExistsError for a target that is there, FileNotFoundError for a source that is not, ImportError for a
    GGUF without its reader, ValueError for a mask token that is not the tokenizer's or lies outside the embedding,
    weights that do not fit the architecture or cannot be turned into floats, and a litgpt checkpoint.

        convert("path/of/L3.1-8B-Magpie-MTP", Path("llama-mtp"), preset="llama-magpie")  # 128259
        convert("SmolLM2-135M-Instruct.Q4_1.gguf", Path("smollm2"))  # None
    """
    # Imported here, so that --help and a mistyped option answer at once.
    from mtpkern.loading import holds_adapter, require_found
    from mtpkern.model import record_settings, recorded_settings, resolve_mask_token, suppress_mask_token

    refuse(k_max is not None and k_max < 1, f"k_max must be at least 1; got {k_max}")
    require_one_of("dtype", dtype, DTYPES)
    if preset is not None:
        require_one_of("preset", preset, PRESETS)
    if target.exists():
        raise FileExistsError(f"{target} is there already; give a new folder")
    require_found(source)
    if (Path(source) / "lit_model.pth").exists() and not (Path(source) / "config.json").exists():
        raise ValueError(f"{source} is a litgpt checkpoint; export it first: litgpt convert_from_litgpt")
    known = PRESETS[preset] if preset is not None else None
    model, tokenizer = (_merged if holds_adapter(source) else _load)(source, dtype)
    recorded = recorded_settings(model)
    wanted = mask_token_id if mask_token_id is not None else known.mask_token_id if known else None
    mask = _mask_of(tokenizer, wanted, recorded.get("mask_token_id"), source)
    if mask is not None:
        resolve_mask_token(model, mask)
        record_settings(model, mask_token_id=mask, k_max=k_max or (known.k_max if known else recorded.get("k_max", 16)))
        record_settings(model, **(known.prompts if known else {}))
        # Other decoders know of no mask token.
        suppress_mask_token(model, mask)
    elif k_max is not None:
        raise ValueError(f"{source} has no mask token to go with k_max; give --mask-token-id, or leave --k-max out")
    model.config.use_cache = True
    stops = list(stop_token_ids or (known.stop_token_ids if known else ()))
    outside = [i for i in stops if not 0 <= i < model.get_input_embeddings().num_embeddings]
    refuse(outside, f"{source}: stop tokens {outside} lie outside the embedding; give its own")
    stops = stops or model.generation_config.eos_token_id
    refuse(stops is None, f"{source} names no stop token; give --preset or --stop-token-ids")
    model.generation_config.eos_token_id = stops
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        if mask is not None:
            write_custom_generate(part)
        for file in part.glob("*config.json"):
            values = _without_auto_map(json.loads(file.read_text(encoding="utf-8")))
            file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return mask


def _load(source: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer in floats, without custom code: the architecture is one that transformers has."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.quantization_config import GgufConfig

    from mtpkern.train.gguf import gguf_of, mend_tokenizer, metadata, stop_tokens

    path = gguf_of(source)
    folder = source if path is None else str(path.parent)
    options: dict[str, Any] = {} if path is None else {"gguf_file": path.name}
    described = {} if path is None else metadata(path)
    tokenizer = _tokenizer(folder, **options)
    method = None if path is None else "gguf"
    try:
        if path is None:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            if isinstance(getattr(config, "quantization_config", None), dict):
                method = config.quantization_config.get("quant_method", "a method without a name")
                config.quantization_config["dequantize"] = True
            options["config"] = config
        else:
            mend_tokenizer(tokenizer, described)
            options["quantization_config"] = GgufConfig(dequantize=True)
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, trust_remote_code=False, **options
        )
    except ValueError as error:
        if _asks_for_code(error):
            raise ValueError(f"{source} is an architecture of its own code, which convert does not run") from error
        raise
    wrong = {name: sorted(loading[name]) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    refuse(any(wrong.values()), f"{source}: the weights do not fit {type(model).__name__}: {wrong}")
    if method is not None:
        model = _in_floats(model, method, source)
    if path is not None:
        model.generation_config.eos_token_id = stop_tokens(tokenizer, described) or None
    return model, tokenizer


def _merged(source: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base of an adapter with what that adds in its weights, and the adapter's own tokenizer where it has one."""
    from mtpkern.adapter_config import is_gated
    from mtpkern.loading import holds_adapter, require_model
    from mtpkern.train.extra import PeftConfig, PeftModel
    from mtpkern.train.lora import merge

    config = PeftConfig.from_pretrained(source)
    refuse(
        is_gated(config),
        f"{source} holds a gated adapter, which acts on mask rows only and cannot be merged; mtpkern generate {source} "
        "decodes with it",
    )
    refuse(config.is_prompt_learning, f"{source} puts virtual tokens before a prompt, which no weights can hold")
    base, named = config.base_model_name_or_path, f"base_model_name_or_path of {source}/adapter_config.json"
    refuse(not base, f"{source} does not say what model it is upon; write that into {named}")
    refuse(
        holds_adapter(base),
        f"{source} is upon {base}, an adapter too: convert that first, and write what comes of it into {named}",
    )
    try:
        require_model(base)
    except OSError as error:
        raise OSError(f"{source} is an adapter, and its base is not there: {error}; mend {named}") from error
    model, tokenizer = _load(base, dtype)
    if (Path(source) / "tokenizer_config.json").exists():
        tokenizer = _tokenizer(source)
    try:
        return merge(PeftModel.from_pretrained(model, source)), tokenizer
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise ValueError(
            f"{source} does not fit {base}, whose vocabulary has grown before it was trained, perhaps: "
            f"{' '.join(str(error).split())}; merge it in Python, upon the base with model.resize_token_embeddings(n): "
            "PeftModel.from_pretrained(model, ...).merge_and_unload().save_pretrained(...)"
        ) from error


def _tokenizer(folder: str, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer as transformers knows it; where its class is custom code, as tokenizer.json describes it."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    except ValueError as error:
        if not _asks_for_code(error):
            raise
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder}: its tokenizer is code of its own, which convert does not run, and there is no tokenizer.json"
        ) from error


def _asks_for_code(error: ValueError) -> bool:
    return "trust_remote_code" in str(error)


def _without_auto_map(value: Any) -> Any:
    """A JSON value without the names of custom code, at any depth."""
    if isinstance(value, dict):
        return {name: _without_auto_map(x) for name, x in value.items() if name != "auto_map"}
    return [_without_auto_map(x) for x in value] if isinstance(value, list) else value


def _in_floats(model: PreTrainedModel, method: str, source: str) -> PreTrainedModel:
    """The model without its quantiser, in floats. Raises ValueError where transformers cannot make them."""
    plain = _plain(model)
    if plain is None:
        with suppress(NotImplementedError, ValueError):  # which it does not offer for all, or has tried already
            model.dequantize()
        plain = _plain(model)
    if plain is None:
        raise ValueError(
            f"{source}: transformers cannot turn weights quantised by {method} into floats here; give the checkpoint "
            "that was quantised"
        )
    return plain


def _plain(model: PreTrainedModel) -> PreTrainedModel | None:
    """A model of the same architecture and weights that knows of no quantiser, only to be saved.

    What was loaded quantised is saved quantised, or not at all, even when its weights are floats by now. None where
    they are no floats of at least two bytes, or others than those of the architecture.
    """
    import torch

    config = deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    expected, found = plain.state_dict(), model.state_dict()
    if {name: x.shape for name, x in expected.items()} != {name: x.shape for name, x in found.items()}:
        return None
    floats = [x for name, x in found.items() if expected[name].is_floating_point()]
    if any(x.itemsize < 2 or not x.is_floating_point() for x in floats):
        return None
    plain.load_state_dict(found, assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def _mask_of(tokenizer: PreTrainedTokenizerBase, wanted: int | None, recorded: int | None, source: str) -> int | None:
    theirs = tokenizer.get_vocab().get(PUBLISHED_MASK) if recorded is None else recorded
    if wanted is not None and theirs is not None and wanted != theirs:
        raise ValueError(f"{source}: its mask token is {theirs}, not {wanted}; leave the id or the preset out")
    return theirs if wanted is None else wanted


def main(argv: Sequence[str]) -> None:
    """Run the command line; raises what `convert` raises."""
    parser = argparse.ArgumentParser(
        prog="mtpkern convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SRC", help="a GGUF, a folder of a checkpoint or an adapter, or a hub id")
    parser.add_argument("target", metavar="DST", type=Path, help="a new folder")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="what is known of a published checkpoint")
    parser.add_argument("--mask-token-id", type=int, metavar="ID", help="where neither preset nor tokenizer tell")
    parser.add_argument("--stop-token-ids", type=int, nargs="+", metavar="ID", help="tokens that end an answer")
    parser.add_argument("--k-max", type=int, metavar="K", help="predictions that it was trained for (default 16)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: as they are)")
    args = parser.parse_args(argv)
    quiet()
    mask = convert(**vars(args))
    prompts = {"prompts": PRESETS[args.preset].prompts} if args.preset else {}
    print(json.dumps({"checkpoint": str(args.target), "mask_token_id": mask, **prompts}))
