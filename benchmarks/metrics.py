"""Caption scores: ours beside pycocoevalcap's, from raw text to BLEU, ROUGE-L and CIDEr.

python -m benchmarks.metrics [--predictions results.json --references annotations.json] [--repetitions 5]

Needs the extra [java] and a Java runtime. Without files it scores captions made up of common words, 5,000 images with 5
references each. It first checks that both sides give the same scores, then times them in turn; then it scores 5,000 to
50,000 images, to show how time and memory grow.
"""

import argparse
import contextlib
import io
import random
import statistics
import subprocess
import sys
import time

from qformer_captioner.evaluation.caption_files import images_to_score, read_predictions, read_references
from qformer_captioner.metrics import References

from .common import RESULTS, alternate, machine, memory, spread, write_result

KEYS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider")


def made_up_corpus(images: int, references: int = 5) -> tuple[list[str], list[list[str]]]:
    """Captions of 8 to 14 words, a few words common and thousands rare, one in twenty with more than plain words."""
    draw = random.Random(0)
    letters = "abcdefghijklmnoprstuvwy"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(12_000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    odd = ["man's", "black-and-white", "doesn't", "(left)", '"stop"', "12:30", "St. Paul", "1/2", "$5", "U.S."]

    def caption() -> str:
        chosen = draw.choices(words, weights, k=draw.randint(8, 14))
        if draw.random() < 0.05:
            chosen[draw.randrange(len(chosen))] = draw.choice(odd)
        return " ".join(chosen).capitalize() + "."

    theirs = [[caption() for _ in range(references)] for _ in range(images)]
    # A prediction shares its first half with a reference, as good captions do.
    ours = [" ".join(own[0].split()[:5] + own[1].split()[5:]) for own in theirs]
    return ours, theirs


def pycocoevalcap_scores(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    with contextlib.redirect_stdout(io.StringIO()):
        tokenizer = PTBTokenizer()
        theirs = tokenizer.tokenize({i: [{"caption": text} for text in own] for i, own in enumerate(references)})
        ours = tokenizer.tokenize({i: [{"caption": text}] for i, text in enumerate(predictions)})
        bleu, _ = Bleu(4).compute_score(theirs, ours)
        rouge, _ = Rouge().compute_score(theirs, ours)
        cider, _ = Cider().compute_score(theirs, ours)
    return dict(zip(KEYS, [*bleu, rouge, cider], strict=True))


def growth(repetitions: int) -> list[dict[str, float]]:
    """Seconds (mean of two) and memory of a fresh process for each number of images."""
    rows = []
    for images in (5_000, 10_000, 20_000, 50_000):
        run = [sys.executable, "-m", "benchmarks.metrics", "--one", str(images)]
        outputs = [subprocess.run(run, check=True, capture_output=True, text=True).stdout for _ in range(repetitions)]
        seconds, before, peak = (
            statistics.median(column) for column in zip(*(map(float, text.split()) for text in outputs), strict=True)
        )
        rows.append({"images": images, "seconds": seconds, "captions_mb": before, "peak_mb": peak})
        print(
            f"{images:>7} images: {seconds:6.2f} s, at most {peak - before:5.0f} MB more than the captions themselves"
        )
    return rows


def score_one(images: int) -> None:
    predictions, references = made_up_corpus(images)
    before = memory("VmRSS")
    start = time.perf_counter()
    References(references).score(predictions)
    print(time.perf_counter() - start, before, memory("VmHWM"))


def draw(rows: list[dict[str, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    images = [row["images"] for row in rows]
    for axis, values, label in (
        (axes[0], [row["seconds"] for row in rows], "seconds, raw text to scores"),
        (axes[1], [row["peak_mb"] - row["captions_mb"] for row in rows], "MB above the captions"),
    ):
        axis.plot(images, values, marker="o")
        axis.set(xlabel="images with 5 references", ylabel=label, xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.3)
    figure.savefig(RESULTS / "metrics.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--predictions", help="COCO results JSON")
    parser.add_argument("--references", help="COCO annotation JSON")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        score_one(options.one)
        return
    if options.predictions:
        theirs, ours = read_references(options.references), read_predictions(options.predictions)
        images = images_to_score(ours, theirs, allow_missing=True)
        predictions, references = [ours[image] for image in images], [theirs.captions[image] for image in images]
    else:
        predictions, references = made_up_corpus(5_000)

    expected, found = pycocoevalcap_scores(predictions, references), References(references).score(predictions)
    difference = max(abs(expected[key] - found[key]) for key in KEYS)
    print(f"{len(predictions)} images, {sum(map(len, references))} references; largest difference {difference:.1e}")
    if difference > 1e-12:
        raise SystemExit("The two sides do not compute the same thing: no timing.")

    ready = References(references)
    seconds = alternate(
        options.repetitions,
        pycocoevalcap=lambda: pycocoevalcap_scores(predictions, references),
        ours=lambda: References(references).score(predictions),
        again=lambda: ready.score(predictions),
    )
    medians = {name: spread(values)["median"] for name, values in seconds.items()}
    for name, values in seconds.items():
        times = spread(values)
        ratio = medians["pycocoevalcap"] / medians[name]
        print(f"{name:<14} {times['median']:7.3f} s  ({times['min']:.3f} to {times['max']:.3f})  {ratio:5.1f} x")
    rows = growth(min(options.repetitions, 2))
    draw(rows)
    result = {
        "images": len(predictions),
        "references": sum(map(len, references)),
        "captions": "files" if options.predictions else "made up",
        "difference": difference,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratio_first": medians["pycocoevalcap"] / medians["ours"],
        "ratio_again": medians["pycocoevalcap"] / medians["again"],
        "growth": rows,
    }
    write_result("metrics", machine("qformer-captioner", "pycocoevalcap", "numpy") | result)


if __name__ == "__main__":
    main()
