"""`mtpkern convert SRC DST`: a plain checkpoint of what is none: a GGUF, quantised weights, or custom code beside them.

The result is safetensors of floats, a tokenizer and a generation config, for which nothing is needed but transformers.

    source                         what becomes of it
    a .gguf file, or a folder      floats (--dtype: others than the file's own); tokenizer, chat template and stop
    with one                       tokens come out of the file
    quantised weights              floats, where transformers can turn them into such
    the paper's published          the same weights with mask token, k_max and stop tokens recorded
    checkpoints (--preset)
    any other                      the same weights

Custom code is neither run nor kept: no *.py, and no auto_map in config or tokenizer. A source without a mask token is
given none: `mtpkern train` adds it.

What the paper's authors published (arXiv 2602.06019) is a Hugging Face checkpoint whose weights are those of an
ordinary Llama or Qwen3. Beside them lies custom code that its config names (auto_map); the tokenizer has 32 tokens
<|mtp_special_token_i|>, of which the first is the mask token; the config says nothing of the mask token, nor the
generation config of all the tokens at which these models stop.

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

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PUBLISHED_MASK = "<|mtp_special_token_0|>"
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Preset:
    """What the config of a published checkpoint leaves unsaid."""

    mask_token_id: int
    stop_token_ids: tuple[int, ...]
    prompts: str
    k_max: int = 16


PRESETS = {
    "llama-magpie": Preset(128259, (128009, 128001), "with the chat template (mtpkern generate --chat)"),
    "qwen3-4b": Preset(151669, (151645, 151643), "without chat template: the question and a blank line"),
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
    of the source. Weights keep their dtype where `dtype` ("float32", "bfloat16", "float16") asks for no other.

    Raises FileExistsError for a target that is there already, FileNotFoundError for a source that is not, ImportError
    for a GGUF without the package that reads it, ValueError for a mask token that is another than the tokenizer's or
    lies outside the embedding, for weights that do not fit the architecture or cannot be turned into floats, and for a
    litgpt checkpoint.

        convert("path/of/L3.1-8B-Magpie-MTP", Path("llama-mtp"), preset="llama-magpie")  # 128259
        convert("SmolLM2-135M-Instruct.Q4_1.gguf", Path("smollm2"))  # None
    """
    # Imported here, so that --help and a mistyped option answer at once.
    from mtpkern.model import record_settings, recorded_settings, resolve_mask_token
    from mtpkern.train.data import require_found

    if k_max is not None and k_max < 1:
        raise ValueError(f"k_max must be at least 1; got {k_max}")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    if target.exists():
        raise FileExistsError(f"{target} is there already; give a new folder")
    require_found(source)
    if (Path(source) / "lit_model.pth").exists() and not (Path(source) / "config.json").exists():
        raise ValueError(f"{source} is a litgpt checkpoint; export it first: litgpt convert_from_litgpt")
    known = PRESETS[preset] if preset is not None else None
    model, tokenizer = _load(source, dtype)
    recorded = recorded_settings(model)
    wanted = mask_token_id if mask_token_id is not None else known.mask_token_id if known else None
    mask = _mask_of(tokenizer, wanted, recorded.get("mask_token_id"), source)
    if mask is not None:
        resolve_mask_token(model, mask)
        record_settings(model, mask_token_id=mask, k_max=k_max or (known.k_max if known else recorded.get("k_max", 16)))
        # Other decoders know of no mask token.
        suppressed = model.generation_config.suppress_tokens or []
        model.generation_config.suppress_tokens = sorted({*suppressed, mask})
    elif k_max is not None:
        raise ValueError(f"{source} has no mask token to go with k_max; give --mask-token-id, or leave --k-max out")
    model.config.use_cache = True
    stops = list(stop_token_ids or (known.stop_token_ids if known else ()))
    if stops:
        outside = [i for i in stops if i >= model.get_input_embeddings().num_embeddings]
        if outside:
            raise ValueError(f"{source}: stop tokens {outside} lie outside the embedding; give its own")
        model.generation_config.eos_token_id = stops
    elif model.generation_config.eos_token_id is None:
        raise ValueError(f"{source} names no stop token; give --preset or --stop-token-ids")
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
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
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False}
    if path is not None:
        described = metadata(path)
        folder = str(path.parent)
        tokenizer = _tokenizer(folder, gguf_file=path.name)
        mend_tokenizer(tokenizer, described)
        options |= {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
    else:
        folder = source
        tokenizer = _tokenizer(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if isinstance(getattr(config, "quantization_config", None), dict):
            config.quantization_config["dequantize"] = True
            options["config"] = config
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    wrong = {name: sorted(loading[name]) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        raise ValueError(f"{source}: the weights do not fit {type(model).__name__}: {wrong}")
    _require_floats(model, source)
    if path is not None:
        model.generation_config.eos_token_id = stop_tokens(tokenizer, described) or None
    if hasattr(model.config, "auto_map"):
        del model.config.auto_map
    return model, tokenizer


def _tokenizer(folder: str, **options: Any) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    # What it was loaded with is saved again.
    tokenizer.init_kwargs.pop("auto_map", None)
    return tokenizer


def _require_floats(model: PreTrainedModel, source: str) -> None:
    """Take the quantiser off, its weights turned into floats where loading has not done so already.

    Raises ValueError where transformers cannot.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return
    method = getattr(quantizer.quantization_config.quant_method, "value", quantizer.quantization_config.quant_method)
    if not _is_plain(model):
        with suppress(NotImplementedError):
            model.dequantize()
        if not _is_plain(model):
            raise ValueError(
                f"{source}: transformers cannot turn weights quantised by {method} into floats here; give the "
                "checkpoint that was quantised"
            )
    # Loading leaves these behind although the weights are floats, and saving refuses for it.
    model.hf_quantizer = None
    for of, name in ((model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(of, name):
            delattr(of, name)


def _is_plain(model: PreTrainedModel) -> bool:
    """Whether the weights are those of the architecture, by name and shape, and floats of at least two bytes."""
    config = deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    import torch

    with torch.device("meta"):
        expected = type(model)(config).state_dict()
    found = model.state_dict()
    return {name: x.shape for name, x in expected.items()} == {name: x.shape for name, x in found.items()} and all(
        x.is_floating_point() and x.itemsize >= 2 for name, x in found.items() if expected[name].is_floating_point()
    )


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
    parser.add_argument("source", metavar="SRC", help="a GGUF, a checkpoint's folder, or a hub id")
    parser.add_argument("target", metavar="DST", type=Path, help="a new folder")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="what is known of a published checkpoint")
    parser.add_argument("--mask-token-id", type=int, metavar="ID", help="where neither preset nor tokenizer tell")
    parser.add_argument("--stop-token-ids", type=int, nargs="+", metavar="ID", help="tokens that end an answer")
    parser.add_argument("--k-max", type=int, metavar="K", help="predictions that it was trained for (default 16)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: as they are)")
    args = parser.parse_args(argv)
    mask = convert(
        args.source,
        args.target,
        preset=args.preset,
        mask_token_id=args.mask_token_id,
        stop_token_ids=args.stop_token_ids,
        k_max=args.k_max,
        dtype=args.dtype,
    )
    result = {"checkpoint": str(args.target), "mask_token_id": mask}
    if args.preset:
        result["prompts"] = PRESETS[args.preset].prompts
    print(json.dumps(result))
