"""The step loop and what it decides: who runs, which tokens, how many."""
