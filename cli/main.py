"""The command `qformer-captioner`: the scripts of this package under one name."""

import importlib
import sys

COMMANDS = {  # its module, and what it does
    "train": ("qformer_captioner.train_hf", "train a captioner on your images"),
    "features": ("qformer_captioner.precompute_features", "run the vision encoder once over a data set"),
    "eval": ("qformer_captioner.eval_captions", "score captions, or caption a benchmark and score that"),
    "caption": ("qformer_captioner.cli.caption", "caption images"),
    "push": ("qformer_captioner.hub.push", "publish what a run has made, with a model card"),
    "convert": ("qformer_captioner.hub.convert", "make a captioner of a BLIP-2 or InstructBLIP"),
    "export": ("qformer_captioner.hub.export", "make a captioner that needs no other folder, or an ONNX file"),
}


def main() -> None:
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        print("usage: qformer-captioner COMMAND ...\n")
        for name, (_, what) in COMMANDS.items():
            print(f"  {name:<10} {what}")
        print("\nqformer-captioner COMMAND --help shows its options and an example.")
        return
    if command not in COMMANDS:
        raise SystemExit(f"error: There is no command {command!r}; there are {', '.join(COMMANDS)}.")
    sys.argv = [f"qformer-captioner {command}", *sys.argv[2:]]
    importlib.import_module(COMMANDS[command][0]).main()


if __name__ == "__main__":
    main()
