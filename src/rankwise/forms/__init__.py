"""Forms: how ΔW is parametrised.  Method → file:

* ``bottleneck`` → bottleneck.py: adapter layers after or parallel to a block.
* ``dense`` → dense.py: a full-size ΔW trained from zero; what ``modules_to_save`` uses.
* ``dora`` → dora.py: DoRA, magnitude and direction.
* ``full`` → full.py: full fine-tuning of the base weights.
* ``lora`` → lora.py: LoRA.
* ``lora_xs`` → lora_xs.py: LoRA-XS, an r×r core between frozen singular vectors.
* ``mos`` → mos.py: MoS, layers share pools of vectors.
* ``paca`` → paca.py: PaCA, a few columns of W.
* ``patch`` → patch.py: a given ΔW, not trained.
* ``rslora`` → lora.py: LoRA with s = α/√r.
* ``svd`` → svd.py: AdaLoRA's P·diag(λ)·Q.

base.py and block.py hold the base classes; fused.py, grouped.py and packed.py the fast forward passes of LoRA.
"""
