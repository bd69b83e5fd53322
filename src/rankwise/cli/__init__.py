"""The command line: the same words as in Python; one file a group of verbs."""
