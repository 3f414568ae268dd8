"""Command `qformer-captioner`, which runs the scripts and tools of this package."""

import importlib
import sys
from dataclasses import dataclass

from ..common.arguments import did_you_mean, in_words


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Args:
        module: module whose `main` runs the subcommand. It is imported only for this subcommand.
        summary: one line for the list of commands.
    """

    module: str
    summary: str

    def run(self) -> None:
        """Import the module and run its `main`, which reads `sys.argv`."""
        importlib.import_module(f"qformer_captioner.{self.module}").main()


COMMANDS = {
    "train": Command("train_hf", "train a captioner on your images"),
    "features": Command("precompute_features", "run the vision encoder once over a data set"),
    "eval": Command("eval_captions", "score captions, or caption a benchmark and score it"),
    "retrieve": Command("eval_retrieval", "score how well a model of stage 1 finds images and texts"),
    "search": Command("cli.search", "find the images of a folder that a text describes"),
    "caption": Command("cli.caption", "caption images"),
    "serve": Command("cli.serve", "answer requests for captions over HTTP, as OpenAI's API does"),
    "push": Command("hub.push", "publish a captioner with a model card on the Hub"),
    "convert": Command("hub.convert", "make a captioner from a BLIP-2 or InstructBLIP checkpoint"),
    "export": Command("hub.export", "make a self-contained captioner, or an ONNX file of its Q-Former"),
}


def usage() -> str:
    """Return the list of commands."""
    lines = [f"  {name:<10} {command.summary}" for name, command in COMMANDS.items()]
    end = "qformer-captioner COMMAND --help shows its options and examples."
    return "\n".join(["usage: qformer-captioner COMMAND ...", "", *lines, "", end])


def main() -> None:
    """Run the command that the command line names.

    Raises:
        SystemExit: if the subcommand does not exist; the message suggests the nearest one.
    """
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())  # noqa: T201 -- argparse prints help texts too
        return
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS) or f" Use {in_words([*COMMANDS])}."
        raise SystemExit(f"error: {name!r} is not a command.{hint}")
    sys.argv = [f"qformer-captioner {name}", *words]  # help texts start with this name of the program
    COMMANDS[name].run()


if __name__ == "__main__":
    main()
