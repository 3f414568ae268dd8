"""TODO."""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from .arguments import CommandParser, unknown_name
from .errors import InputError

RECIPES = Path(__file__).parent.parent / "recipes"
LARGEST_RECIPE = 100_000  # bytes
RECIPE_FOLDERS = (".", "ablations", "data")  # of recipes; `recipes/` holds files of other kinds, too


# Recipes


def recipes_of(words: list[str]) -> list[str]:
    """The recipes that a command line names."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", nargs="*", default=[])
    return parser.parse_known_args(words)[0].recipe


def read_recipes(names: list[str], parser: CommandParser) -> list[str]:
    """Recipes as command-line words, which the parser then checks like any others.

    Raises:
        InputError: if a recipe is not there, is no YAML mapping, begins with itself, or has an unknown field.
    """
    words = []
    for key, value in merge(*(load_recipe(find_recipe(name, Path()), parser) for name in names)).items():
        if isinstance(value, dict):
            try:
                words += [f"--{key}", json.dumps(value)]
            except TypeError as error:  # YAML has dates, too
                raise InputError(f"In a recipe, the field {key!r} holds what is no JSON: {error}.") from error
        elif isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        elif value is not None:
            words += [f"--{key}", str(value)]
    return words


class RecipeLoader(yaml.SafeLoader):
    """Plain YAML: no aliases, of which a few lines can stand for gigabytes, and no key twice."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """As the loader does."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="an alias (*)", problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """As the loader does."""
        keys = [key.value for key, _ in node.value]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                mark = node.value[place][0].start_mark
                raise yaml.MarkedYAMLError(problem=f"the field {key!r} for the second time", problem_mark=mark)
        return super().construct_mapping(node, deep)


def load_recipe(path: Path, parser: CommandParser, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The fields of a recipe, on top of those of the recipes that it begins with (its field `recipe`)."""
    if path in above:
        circle = " begins with ".join(repr(str(each)) for each in [*above[above.index(path) :], path])
        raise InputError(f"Recipes must not begin with themselves: {circle}.")
    if path.stat().st_size > LARGEST_RECIPE:
        raise InputError(f"The recipe {str(path)!r} has more than {LARGEST_RECIPE:,} bytes, and is none.")
    try:
        own = yaml.load(path.read_text(encoding="utf-8"), RecipeLoader)
    except yaml.MarkedYAMLError as error:  # without the lines themselves: whatever a recipe names would be shown
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"The recipe {str(path)!r} is not valid YAML: {error.problem}{line}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # no text; endless numbers; thousands of brackets
        raise InputError(f"The recipe {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(own, dict):
        raise InputError(f"The recipe {str(path)!r} must be a list of `option: value` lines.")
    for key in own:
        if key not in parser.option_names:
            raise unknown_name(f"The recipe {str(path)!r} has an unknown field", key, parser.option_names)
    names = own.pop("recipe", None) or []
    names = names if isinstance(names, list) else [names]
    return merge(*(load_recipe(find_recipe(str(name), path.parent), parser, (*above, path)) for name in names), own)


def merge(*recipes: dict[str, Any]) -> dict[str, Any]:
    """One recipe out of several. Later ones win, in mappings such as `qformer_config` field by field."""
    merged: dict[str, Any] = {}
    for recipe in recipes:
        for key, value in recipe.items():
            below = merged.get(key)
            merged[key] = {**below, **value} if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def find_recipe(name: str, folder: Path) -> Path:
    """The file of a recipe: beside the one that names it, or one of ours, with or without folder and `.yaml`."""
    for path in (folder / name, folder / f"{name}.yaml"):
        if path.is_file():
            return path.resolve()
    ours = {path.stem: path for each in RECIPE_FOLDERS for path in sorted((RECIPES / each).glob("*.yaml"))}
    stem = Path(name).name.removesuffix(".yaml")
    if stem not in ours:
        raise InputError(f"There is no recipe {name!r}. Give a YAML file, or one of {', '.join(sorted(ours))}.")
    return ours[stem].resolve()
