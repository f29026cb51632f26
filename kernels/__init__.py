"""The ops of mtpkern: one file an op, holding its kernel, its torch reference and its public function.

Dimensions, the same letters in every file:

    B   sequences in a batch            Hq  query heads           V  vocabulary
    R   packed rows of a pass           Hkv key/value heads       K  k, tokens predicted in one pass
    T   rows (= keys) of a layout       G   Hq // Hkv             H  hidden size
    C   capacity of a KV cache          D   head dimension        N  ground-truth tokens

Import the op's module (`from mtpkern.kernels.readout import readout`); this package imports none of them.
"""
