"""`mtpkern convert SRC DST`: the paper's published checkpoints as plain ones of ours.

What is published (arXiv 2602.06019) is a Hugging Face checkpoint whose weights are those of an ordinary Llama or Qwen3.
Beside them lies custom code that its config names (auto_map), which mtpkern does not run; the tokenizer has 32 tokens
<|mtp_special_token_i|>, of which the first is the mask token; the config says nothing of the mask token, nor the
generation config of all the tokens at which these models stop. The result has the same weights, records the mask token
and k_max in its config, names the stop tokens, and needs no custom code.

    preset           mask token  stop tokens      prompts
    llama-magpie     128259      128009, 128001   chat template
    qwen3-4b         151669      151645, 151643   question and a blank line, no chat template
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PUBLISHED_MASK = "<|mtp_special_token_0|>"


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
) -> int:
    """Write the checkpoint `source` (a path or hub id) to the new folder `target`, whole or not at all.

    Returns the mask token's id. That is the argument, the preset's, or else the tokenizer's <|mtp_special_token_0|>;
    stop tokens are the argument, the preset's, or else those of the source. Weights keep their dtype.

    Raises FileExistsError for a target that is there already, FileNotFoundError for a source that is not, ValueError
    for a mask token that is unknown, is another than the tokenizer's or lies outside the embedding, for weights that do
    not fit the architecture, and for a litgpt checkpoint.

        convert("path/of/L3.1-8B-Magpie-MTP", Path("llama-mtp"), preset="llama-magpie")  # 128259
    """
    # Imported here, so that --help and a mistyped option answer at once.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mtpkern.model import record_settings, resolve_mask_token
    from mtpkern.train.data import require_found

    if k_max is not None and k_max < 1:
        raise ValueError(f"k_max must be at least 1; got {k_max}")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}")
    if target.exists():
        raise FileExistsError(f"{target} is there already; give a new folder")
    require_found(source)
    if (Path(source) / "lit_model.pth").exists() and not (Path(source) / "config.json").exists():
        raise ValueError(f"{source} is a litgpt checkpoint; export it first: litgpt convert_from_litgpt")
    known = PRESETS[preset] if preset is not None else None
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    wanted = mask_token_id if mask_token_id is not None else known.mask_token_id if known else None
    mask = _mask_of(tokenizer, wanted, source)
    # Custom code is not trusted: the architecture is one that transformers has.
    model, loading = AutoModelForCausalLM.from_pretrained(
        source, dtype="auto", trust_remote_code=False, output_loading_info=True
    )
    wrong = {name: sorted(loading[name]) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        raise ValueError(f"{source}: the weights do not fit {type(model).__name__}: {wrong}")
    resolve_mask_token(model, mask)
    if hasattr(model.config, "auto_map"):
        del model.config.auto_map
    model.config.use_cache = True
    stops = list(stop_token_ids or (known.stop_token_ids if known else ()))
    if stops:
        outside = [i for i in stops if i >= model.get_input_embeddings().num_embeddings]
        if outside:
            raise ValueError(f"{source}: stop tokens {outside} lie outside the embedding; give its own")
        model.generation_config.eos_token_id = stops
    elif model.generation_config.eos_token_id is None:
        raise ValueError(f"{source} names no stop token; give --preset or --stop-token-ids")
    record_settings(model, mask_token_id=mask, k_max=k_max or (known.k_max if known else 16))
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(target)
    return mask


def _mask_of(tokenizer: PreTrainedTokenizerBase, wanted: int | None, source: str) -> int:
    theirs = tokenizer.get_vocab().get(PUBLISHED_MASK)
    if wanted is None and theirs is None:
        raise ValueError(f"{source}: the tokenizer has no {PUBLISHED_MASK}; give --mask-token-id or --preset")
    if wanted is not None and theirs is not None and wanted != theirs:
        raise ValueError(f"{source}: {PUBLISHED_MASK} is token {theirs}, not {wanted}; leave the id or the preset out")
    return theirs if wanted is None else wanted


def main(argv: Sequence[str]) -> None:
    """Run the command line; raises what `convert` raises."""
    parser = argparse.ArgumentParser(
        prog="mtpkern convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SRC", help="path or hub id of the published checkpoint")
    parser.add_argument("target", metavar="DST", type=Path, help="a new folder")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="what is known of a published checkpoint")
    parser.add_argument("--mask-token-id", type=int, metavar="ID", help="where neither preset nor tokenizer tell")
    parser.add_argument("--stop-token-ids", type=int, nargs="+", metavar="ID", help="tokens that end an answer")
    parser.add_argument("--k-max", type=int, metavar="K", help="predictions that it was trained for (default 16)")
    args = parser.parse_args(argv)
    mask = convert(
        args.source,
        args.target,
        preset=args.preset,
        mask_token_id=args.mask_token_id,
        stop_token_ids=args.stop_token_ids,
        k_max=args.k_max,
    )
    result = {"checkpoint": str(args.target), "mask_token_id": mask}
    if args.preset:
        result["prompts"] = PRESETS[args.preset].prompts
    print(json.dumps(result))
