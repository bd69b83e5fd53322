"""Inits: the initial values of A and B.  Method → file:

* ``eva`` → eva.py: EVA, principal components of the inputs, ranks by explained variance.
* ``gaussian`` → pissa.py: Gaussian A, zero B.
* ``loftq`` → loftq.py: LoftQ, a quantised W and the low-rank part of its error.
* ``lora_ga`` → lora_ga.py: LoRA-GA, singular vectors of the gradient.
* ``olora`` → pissa.py: OLoRA, QR of W.
* ``pissa`` → pissa.py: PiSSA, principal singular vectors of W.
"""
