"""Losses: terms beside the task's loss.  Method → file:

* ``ba_lora`` → ba_lora.py: BA-LoRA's regularisers.
* ``cfg_distillation`` → cfg_distillation.py: distils classifier-free guidance.
* ``orthogonality`` → orthogonality.py: AdaLoRA's soft orthogonality.
"""
