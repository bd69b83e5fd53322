"""Which recipes can be trained beside serving."""

from __future__ import annotations

from rankwise.errors import RecipeError
from rankwise.recipe import Recipe, build


def refuse_recipe(recipe: Recipe) -> None:
    """Raise RecipeError where a recipe cannot be trained window by window, or would write to the base that serves."""
    for part in recipe.all_parts():
        form = build("form", part.form)
        why = None
        if part.dropout:
            why = f"dropout = {part.dropout}, whose mask a window that is computed twice would draw twice; set it to 0"
        elif part.router:
            why = "a router, whose decisions are recorded over whole forwards; leave it out"
        elif "weight" in form.provides:
            why = f"the form {form.info.name!r}, which moves the base's own weights; choose one that adds to them"
        elif part.init and build("init", part.init).replaces:
            why = f"the init {build('init', part.init).info.name!r}, which replaces the base's weights; choose another"
        if why is not None:
            raise RecipeError(f"This recipe has {why}, or train apart from the server.")
    if recipe.losses:
        raise RecipeError(
            "This recipe has extra losses, which need a whole forward's outputs; leave them out, or train apart from the server."
        )
