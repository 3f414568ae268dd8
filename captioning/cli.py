"""The command `qformer-captioner`: the scripts of this package under one name.

qformer-captioner train --recipe scenes
qformer-captioner features --vision_model_name_or_path facebook/dinov2-small --dataset_name my_folder
qformer-captioner eval --predictions results.json --references annotations.json
qformer-captioner convert Salesforce/blip2-opt-2.7b outputs/blip2
qformer-captioner push outputs/own_images somebody/my-captioner
"""

import importlib
import sys

COMMANDS = {
    "train": "qformer_captioner.train_hf",
    "features": "qformer_captioner.precompute_features",
    "eval": "qformer_captioner.eval_captions",
    "convert": "qformer_captioner.captioning.convert",
    "export": "qformer_captioner.captioning.export",
    "push": "qformer_captioner.captioning.push",
}


def main() -> None:
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        print(__doc__)
        return
    if command not in COMMANDS:
        raise SystemExit(f"error: There is no command {command!r}; there are {', '.join(COMMANDS)}.")
    sys.argv = [f"qformer-captioner {command}", *sys.argv[2:]]
    importlib.import_module(COMMANDS[command]).main()


if __name__ == "__main__":
    main()
