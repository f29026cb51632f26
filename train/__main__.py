"""`python -m mtpkern.train`: what `mtpkern train` does, for `torchrun -m` and `accelerate launch -m`."""

import sys

from mtpkern.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
