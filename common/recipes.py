"""Recipes: YAML files of options, which may extend other recipes.

```yaml
recipe: clip_t5            # begins with the fields of recipes/clip_t5.yaml
dataset_name: photographs
num_train_epochs: 5
qformer_config:
  num_query_tokens: 16     # the other fields of clip_t5's qformer_config stay
```
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .arguments import CommandParser, unknown_name
from .errors import InputError, one_line

RECIPES = Path(__file__).parent.parent / "recipes"
RECIPE_FOLDERS = (".", "ablations", "data")  # folders of recipes below RECIPES, which holds other files, too
MAX_RECIPE_BYTES = 100_000


# ----------------------------------------------------------------------------------------------------------------------
# From a command line to its recipes
# ----------------------------------------------------------------------------------------------------------------------


def recipes_of(words: Sequence[str]) -> list[str]:
    """Return the recipes that a command line names with `--recipe`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", nargs="*", default=[])
    return parser.parse_known_args(words)[0].recipe


def read_recipes(names: Sequence[str], parser: CommandParser) -> list[str]:
    """Return recipes as the arguments of a command line, which the parser then checks.

    Args:
        names: YAML files, or names of recipes of this package. Later recipes override earlier ones.
        parser: the parser of the options that recipes may set.

    Raises:
        InputError: if a recipe does not exist, is not a YAML mapping, extends itself, or has an unknown field.
    """
    recipe = merge(*(load_recipe(find_recipe(name, Path()), parser) for name in names))
    return [word for name, value in recipe.items() for word in as_words(name, value)]


def as_words(name: str, value: Any) -> list[str]:
    """Return a field of a recipe as the arguments of a command line. A field that is `null` gives no arguments."""
    if value is None:
        return []
    if isinstance(value, dict):
        try:
            return [f"--{name}", json.dumps(value)]
        except TypeError as error:  # for example a date
            raise InputError(f"The field {name!r} of a recipe cannot be written as JSON: {one_line(error)}.") from error
    return [f"--{name}", *map(str, value if isinstance(value, list) else [value])]


# ----------------------------------------------------------------------------------------------------------------------
# From files to fields
# ----------------------------------------------------------------------------------------------------------------------


def find_recipe(name: str, folder: Path) -> Path:
    """Return the file of a recipe.

    Args:
        name: path of a YAML file, or name of a recipe of this package. `.yaml` may be left out.
        folder: folder in which relative paths start.

    Raises:
        InputError: if there is no such recipe; the message lists those of this package.
    """
    for path in (folder / name, folder / f"{name}.yaml"):
        if path.is_file():
            return path.resolve()
    included = {path.stem: path for below in RECIPE_FOLDERS for path in sorted((RECIPES / below).glob("*.yaml"))}
    stem = Path(name).name.removesuffix(".yaml")
    if stem not in included:
        raise InputError(f"There is no recipe {name!r}. Give a YAML file, or one of {', '.join(sorted(included))}.")
    return included[stem].resolve()


def load_recipe(path: Path, parser: CommandParser, parents: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the fields of a recipe, merged into those of the recipes that it extends (its field `recipe`).

    Args:
        path: the YAML file.
        parser: the parser of the options that a recipe may set.
        parents: the recipes that extend this one.

    Raises:
        InputError: if the file is not a YAML mapping, has an unknown field, or extends itself.
    """
    if path in parents:
        circle = " begins with ".join(repr(str(file)) for file in [*parents[parents.index(path) :], path])
        raise InputError(f"Recipes must not begin with themselves: {circle}.")
    fields = read_yaml(path)
    for name in fields:
        if name not in parser.option_names:
            raise unknown_name(f"The recipe {str(path)!r} has an unknown field", name, parser.option_names)
    bases = fields.pop("recipe", None) or []
    bases = bases if isinstance(bases, list) else [bases]
    loaded = (load_recipe(find_recipe(str(base), path.parent), parser, (*parents, path)) for base in bases)
    return merge(*loaded, fields)


def merge(*recipes: dict[str, Any]) -> dict[str, Any]:
    """Merge recipes into one.

    Later recipes override earlier ones, and mappings such as `qformer_config` are merged field by field.
    """
    merged: dict[str, Any] = {}
    for recipe in recipes:
        for name, value in recipe.items():
            base = merged.get(name)
            merged[name] = {**base, **value} if isinstance(base, dict) and isinstance(value, dict) else value
    return merged


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Raises:
        InputError: if the file is too large or not a YAML mapping. The message does not quote the file, because a
            recipe can name any file.
    """
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise InputError(f"The recipe {str(path)!r} has more than {MAX_RECIPE_BYTES:,} bytes: it is not a recipe.")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), RecipeLoader)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"The recipe {str(path)!r} is not valid YAML: {error.problem}{line}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # for example binary data
        raise InputError(f"The recipe {str(path)!r} is not valid YAML: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"The recipe {str(path)!r} must be a list of `option: value` lines.")
    return content


class RecipeLoader(yaml.SafeLoader):
    """YAML loader that refuses duplicate fields and aliases. A few lines of aliases can expand to gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node as `yaml.SafeLoader` does.

        Raises:
            yaml.MarkedYAMLError: for an alias.
        """
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="an alias (*) is not supported", problem_mark=self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Construct a mapping as `yaml.SafeLoader` does.

        Raises:
            yaml.MarkedYAMLError: for a field that is given twice.
        """
        seen: list[Any] = []  # a key that is a list or a mapping cannot be hashed
        for key, _ in node.value:
            if key.value in seen:
                problem = f"the field {key.value!r} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.append(key.value)
        return super().construct_mapping(node, deep)
