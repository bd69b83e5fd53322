"""Run by no server: the simulator with its pool, admission test, scores and traces, merge_mode, replica routing, and references for tests."""
