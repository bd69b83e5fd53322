"""Run by no server: the engine's simulator, traffic generators, and references that tests hold the real parts to."""
