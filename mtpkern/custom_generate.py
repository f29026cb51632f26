"""custom_generate: the file in a checkpoint by which transformers' own `model.generate` decodes several tokens a pass.

transformers runs it where a caller trusts the checkpoint's code, and nowhere else:

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.generate(**inputs)

Who trusts none passes no code along: `model.generate = partial(mtpkern.generate, model)` does the same.
"""

from __future__ import annotations

from pathlib import Path

from mtpkern import ASSETS


def write_custom_generate(folder: str | Path) -> None:
    """Write the shipped `custom_generate/generate.py` into a checkpoint's folder, in place of one that is there.

    Raises FileNotFoundError where there is no such folder.

    write_custom_generate("runs/mine")
    """
    code = (ASSETS / "custom_generate" / "generate.py").read_text(encoding="utf-8")
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"expected the folder of a checkpoint, got {str(folder)!r}, which is none")
    file = Path(folder) / "custom_generate" / "generate.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text(code, encoding="utf-8")
