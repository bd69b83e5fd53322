"""How the change of a weight is parametrised: one file a form."""
