"""Caption scores from this package and from pycocoevalcap, from raw text to BLEU, ROUGE-L and CIDEr.

    python -m benchmarks.metrics [--predictions results.json --references annotations.json] [--repetitions 5]

Needs the extra [java] and a Java runtime. Without files it scores 5,000 images with 5 references each, whose captions
are made of random words. Both sides must give the same scores before they are timed in turn. Scoring 5,000 to 50,000
images then shows how time and memory grow.
"""

import argparse
import contextlib
import io
import json
import random
import statistics
import time
from typing import Any

from qformer_captioner.evaluation.caption_files import images_to_score, read_predictions, read_references
from qformer_captioner.metrics import References

from .common import (
    machine_facts,
    new_figure,
    peak_memory,
    resident_memory,
    run_worker,
    save_figure,
    summarize,
    time_in_turn,
    time_ratios,
    write_result,
)

SCORES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider")
GROWTH_IMAGES = (5_000, 10_000, 20_000, 50_000)
SPECIAL_WORDS = ["man's", "black-and-white", "doesn't", "(left)", '"stop"', "12:30", "St. Paul", "1/2", "$5", "U.S."]


def random_corpus(images: int, references_per_image: int = 5) -> tuple[list[str], list[list[str]]]:
    """Return a prediction and the references of each image, always the same ones.

    Captions have 8 to 14 words. A few words are frequent and thousands are rare. One caption in twenty has a word
    with punctuation or digits.
    """
    generator = random.Random(0)
    letters = "abcdefghijklmnoprstuvwy"
    vocabulary = ["".join(generator.choices(letters, k=generator.randint(2, 9))) for _ in range(12_000)]
    frequencies = [1 / (rank + 3) for rank in range(len(vocabulary))]

    def random_caption() -> str:
        words = generator.choices(vocabulary, frequencies, k=generator.randint(8, 14))
        if generator.random() < 0.05:
            words[generator.randrange(len(words))] = generator.choice(SPECIAL_WORDS)
        return " ".join(words).capitalize() + "."

    references = [[random_caption() for _ in range(references_per_image)] for _ in range(images)]
    # A prediction begins like a reference, as those of a good captioner do.
    predictions = [" ".join(texts[0].split()[:5] + texts[1].split()[5:]) for texts in references]
    return predictions, references


def pycocoevalcap_scores(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    with contextlib.redirect_stdout(io.StringIO()):
        tokenizer = PTBTokenizer()
        expected = tokenizer.tokenize({i: [{"caption": text} for text in texts] for i, texts in enumerate(references)})
        predicted = tokenizer.tokenize({i: [{"caption": text}] for i, text in enumerate(predictions)})
        bleu, _ = Bleu(4).compute_score(expected, predicted)
        rouge, _ = Rouge().compute_score(expected, predicted)
        cider, _ = Cider().compute_score(expected, predicted)
    return dict(zip(SCORES, [*bleu, rouge, cider], strict=True))


def check_equal(predictions: list[str], references: list[list[str]]) -> float:
    """Check that both sides give the same scores to 1e-12, and return the largest difference.

    Raises:
        SystemExit: if a difference is larger.
    """
    expected, scores = pycocoevalcap_scores(predictions, references), References(references).score(predictions)
    difference = max(abs(expected[name] - scores[name]) for name in SCORES)
    print(f"{len(predictions)} images, {sum(map(len, references))} references; largest difference {difference:.1e}")
    if difference > 1e-12:
        raise SystemExit("Both sides must give the same scores, and they do not. Nothing was measured.")
    return difference


def measure_times(predictions: list[str], references: list[list[str]], repetitions: int) -> dict[str, Any]:
    """Time pycocoevalcap, our scores, and our scores for references that were prepared before."""
    prepared = References(references)
    seconds = time_in_turn(
        repetitions,
        pycocoevalcap=lambda: pycocoevalcap_scores(predictions, references),
        ours=lambda: References(references).score(predictions),
        again=lambda: prepared.score(predictions),
    )
    times = {name: summarize(values) for name, values in seconds.items()}
    ratios = time_ratios(times, "pycocoevalcap")
    for name, summary in times.items():
        span = f"({summary['min']:.3f} to {summary['max']:.3f})"
        print(f"{name:<14} {summary['median']:7.3f} s  {span}  {ratios[name]:5.1f} x")
    return {"seconds": times, "ratio_first": ratios["ours"], "ratio_again": ratios["again"]}


def score_in_this_process(images: int) -> dict[str, float]:
    """Score a random corpus once. Return the seconds, and in MB the memory with the captions and the peak."""
    predictions, references = random_corpus(images)
    captions_mb = resident_memory()
    start = time.perf_counter()
    References(references).score(predictions)
    return {"seconds": time.perf_counter() - start, "captions_mb": captions_mb, "peak_mb": peak_memory()}


def measure_growth(repetitions: int) -> list[dict[str, float]]:
    """Return the median seconds and memory of fresh processes for each number of images."""
    rows = []
    for images in GROWTH_IMAGES:
        runs = [run_worker("metrics", images) for _ in range(repetitions)]
        medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        rows.append({"images": images} | medians)
        above = medians["peak_mb"] - medians["captions_mb"]
        print(f"{images:>7} images: {medians['seconds']:6.2f} s, peak {above:5.0f} MB above the captions")
    return rows


def plot_growth(rows: list[dict[str, float]]) -> None:
    """Draw seconds and memory over the number of images."""
    figure, axes = new_figure(2, 8, 3)
    images = [row["images"] for row in rows]
    for axis, values, label in (
        (axes[0], [row["seconds"] for row in rows], "seconds, raw text to scores"),
        (axes[1], [row["peak_mb"] - row["captions_mb"] for row in rows], "MB above the captions"),
    ):
        axis.plot(images, values, marker="o")
        axis.set(xlabel="images with 5 references", ylabel=label, xlim=(0, None), ylim=(0, None))
    save_figure(figure, "metrics")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--predictions", help="Predicted captions, as a COCO results JSON file.")
    parser.add_argument("--references", help="Reference captions, as a COCO annotation JSON file.")
    parser.add_argument("--repetitions", type=int, default=5, help="Number of timed runs of each side.")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)  # number of images: see run_worker
    return parser.parse_args()


def read_captions(predictions_file: str, references_file: str) -> tuple[list[str], list[list[str]]]:
    """Read the captions of the images that both files have."""
    references, predictions = read_references(references_file), read_predictions(predictions_file)
    images = images_to_score(predictions, references, allow_missing=True)
    return [predictions[image] for image in images], [references.captions[image] for image in images]


def main() -> None:
    options = parse_options()
    if options.worker:
        print(json.dumps(score_in_this_process(options.worker)))
        return
    if options.predictions:
        predictions, references = read_captions(options.predictions, options.references)
    else:
        predictions, references = random_corpus(5_000)
    result = {
        "images": len(predictions),
        "references": sum(map(len, references)),
        "captions": "files" if options.predictions else "made up",
        "difference": check_equal(predictions, references),
        **measure_times(predictions, references, options.repetitions),
        "growth": measure_growth(min(options.repetitions, 2)),
    }
    plot_growth(result["growth"])
    write_result("metrics", machine_facts("qformer-captioner", "pycocoevalcap", "numpy") | result)


if __name__ == "__main__":
    main()
