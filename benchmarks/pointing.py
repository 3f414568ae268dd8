"""Whether the maps of the demo point at what a word names, on drawings whose objects stand at known places.

python train_hf.py && python -m benchmarks.pointing [--model outputs/scenes] [--drawings 500]

Held-out drawings of two or three objects, each with a reference caption. A word that names a colour or a shape is of
one object; its map points at the object whose patch it lights most. Beside the words' maps (gradient x attention): the
same question asked of what all queries look at together, which knows of no word, and chance.
"""

import argparse

import numpy as np
from transformers import AutoModel

from demo import attention
from qformer_captioner.data.scenes import Scene, load_scenes

from .common import machine, write_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/scenes")
    parser.add_argument("--drawings", type=int, default=500)
    arguments = parser.parse_args()
    eager = {"qformer_config": "eager"}
    model = AutoModel.from_pretrained(arguments.model, trust_remote_code=True, attn_implementation=eager)
    pointed = {kind: {"its word's map": [], "all queries": [], "chance": []} for kind in ("shape", "colour")}
    for row in load_scenes(0, arguments.drawings)["validation"]:
        things = Scene.from_json(row["scene"]).things
        if len(things) == 1:
            continue
        image = attention.encode_image(model, row["image"])
        maps = attention.attention_maps(model, image, model.processor.encode_caption(row["caption"][0]))
        patch_of = {(int(thing.y * image.grid[0]), int(thing.x * image.grid[1])): thing for thing in things}
        for word in maps.words:
            for kind, results in pointed.items():
                if word.text in (getattr(thing, kind) for thing in things):
                    for name, patches in (("its word's map", word.patches), ("all queries", maps.queries.mean(axis=0))):
                        brightest = patch_of[max(patch_of, key=lambda patch: patches[patch])]
                        results[name].append(getattr(brightest, kind) == word.text)
                    results["chance"].append(1 / len(things))
    shares = {kind: {name: float(np.mean(hits)) for name, hits in each.items()} for kind, each in pointed.items()}
    for kind, each in shares.items():
        said = ", ".join(f"{name} {share:.1%}" for name, share in each.items())
        print(f"{len(pointed[kind]['chance'])} words that name a {kind}: {said}")
    facts = machine("qformer-captioner", "torch", "transformers")
    write_result("pointing", {**facts, "drawings": arguments.drawings, "points_at_its_object": shares})


if __name__ == "__main__":
    main()
