"""Accuracy of the demo's attention maps: how often the map of a word points at the object that the word names.

    python train_hf.py && python -m benchmarks.pointing [--model outputs/scenes] [--drawings 500]

The images are held-out drawings of two or three objects in known places, each with a reference caption. A word that
names a colour or a shape belongs to one object. A map points at the object whose patch is the brightest. The maps of
words (gradient x attention) are compared with two baselines: the mean attention of all queries, which depends on no
word, and chance.
"""

import argparse

import numpy as np
from transformers import AutoModel, PreTrainedModel

from demo import attention
from qformer_captioner.data.scenes import Scene, load_scenes

from .common import machine_facts, write_result

KINDS = ("shape", "colour")
WORD_MAP, ALL_QUERIES, CHANCE = "its word's map", "all queries", "chance"


def pointing_hits(model: PreTrainedModel, row: dict) -> list[tuple[str, dict[str, float]]]:
    """Return which maps point at the right object, for each word of the caption that names a shape or a colour.

    Args:
        model: a captioner whose Q-Former has eager attention.
        row: drawing of [`load_scenes`].

    Returns:
        Pairs of a kind (`"shape"` or `"colour"`) and a share of 0 or 1 for each map. For chance it is 1 / objects.
    """
    things = Scene.from_json(row["scene"]).things
    if len(things) == 1:
        return []
    image = attention.encode_image(model, row["image"])
    maps = attention.attention_maps(model, image, model.processor.encode_caption(row["caption"][0]))
    rows, columns = image.grid
    thing_at = {(int(thing.y * rows), int(thing.x * columns)): thing for thing in things}
    hits = []
    for word in maps.words:
        for kind in KINDS:
            if word.text not in [getattr(thing, kind) for thing in things]:
                continue
            shares = {CHANCE: 1 / len(things)}
            for name, patches in ((WORD_MAP, word.patches), (ALL_QUERIES, maps.queries.mean(axis=0))):
                brightest = max(thing_at, key=patches.__getitem__)
                shares[name] = float(getattr(thing_at[brightest], kind) == word.text)
            hits.append((kind, shares))
    return hits


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="outputs/scenes", help="Captioner that was trained on drawings.")
    parser.add_argument("--drawings", type=int, default=500, help="Number of held-out drawings.")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    eager = {"qformer_config": "eager"}  # only eager attention returns its weights
    model = AutoModel.from_pretrained(options.model, trust_remote_code=True, attn_implementation=eager)
    drawings = load_scenes(0, options.drawings)["validation"]
    hits = [hit for row in drawings for hit in pointing_hits(model, row)]
    accuracies = {}
    for kind in KINDS:
        shares = [shares for hit_kind, shares in hits if hit_kind == kind]
        accuracies[kind] = {
            name: float(np.mean([share[name] for share in shares])) for name in (WORD_MAP, ALL_QUERIES, CHANCE)
        }
        figures = ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in accuracies[kind].items())
        print(f"{len(shares)} words that name a {kind}: {figures}")
    facts = machine_facts("qformer-captioner", "torch", "transformers")
    write_result("pointing", {**facts, "drawings": options.drawings, "points_at_its_object": accuracies})


if __name__ == "__main__":
    main()
