"""Routers: which components or experts act on which token.  Method → file:

* ``arrow`` → arrow.py: Arrow, routing over trained LoRAs without training.
* ``mixlora`` → mixlora.py: MixLoRA, experts over an MLP.
* ``smora`` → smora.py: SMoRA, rank-one components as experts.
"""
