"""Budgets: which components or layers train when.  Method → file:

* ``adalora`` → adalora.py: AdaLoRA, prunes components by importance.
* ``lisa`` → lisa.py: LISA, a few layers at a time.
* ``lt_sft`` → lt_sft.py: LT-SFT, the entries that moved most.
"""
