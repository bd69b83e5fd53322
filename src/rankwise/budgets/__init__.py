"""Who trains when, and with how much: score, budget, allocate, actuate, resync. One file a method."""
