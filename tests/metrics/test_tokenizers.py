"""Languages without spaces are scored on characters or on the tokens of a tokenizer, and never in silence as 0."""

import json

import pytest

from qformer_captioner import eval_captions
from qformer_captioner.common.errors import InputError
from qformer_captioner.evaluation.caption_files import ReferenceSet
from qformer_captioner.evaluation.scoring import score_captions
from qformer_captioner.metrics import CaptionMetrics, DocumentFrequencies, References
from qformer_captioner.metrics.tokenizers import first_without_spaces

from ..fixtures import tiny
from .test_corpus import assert_equal, toolkit_scores

CHINESE = [
    ["一只狗在草地上奔跑。", "草地上的棕色狗"],
    ["一只猫在沙发上睡觉", "沙发上的猫T恤"],
    ["两个人骑自行车", "街上有两个人 骑车"],
]
PREDICTIONS = ["一只狗在草地上", "猫在睡觉", "三个人骑自行车"]

WITHOUT_SPACES = {
    "Chinese": ["一只狗在草地上奔跑。", "两个人骑自行车"],
    "Chinese of few letters": ["红狗", "绿猫"],
    "Chinese with spaces between phrases": ["一只狗, 在草地上奔跑", "两个人 在骑自行车"],
    "Chinese with English words": ["一只dog在草地上run", "男子穿T恤"],
    "Japanese": ["草の上を走る犬", "スケートボードに乗る男性"],
    "Thai": ["สุนัขวิ่งบนหญ้า", "ผู้ชายกำลังขี่จักรยาน บนถนน"],
    "Lao": ["ໝາແລ່ນຢູ່ເທິງຫຍ້າ"],
    "Khmer": ["ឆ្កែកំពុងរត់លើស្មៅ"],
    "Burmese": ["ခွေးတစ်ကောင် မြက်ပေါ်တွင် ပြေးနေသည်"],
    "half of the captions": ["a dog runs", "一只狗在草地上奔跑"],
}
WITH_SPACES = {
    "English": ["a dog runs", "a cat"],
    "Korean": ["개가 잔디 위를 달린다", "한 남자가 자전거를 타고 있다"],
    "Vietnamese": ["một con chó chạy trên cỏ"],
    "Hindi": ["कुत्ता दौड़ रहा है"],
    "Arabic": ["كلب يجري على العشب"],
    "emoji": ["a dog 🐶 runs 🏃‍♂️", "🐶🐶🐶"],
    "English with Chinese words": ["a sign that says 出口 on a wall"],
    "one Chinese caption among many": ["a dog runs"] * 20 + ["一只狗在草地上奔跑"],
    "Chinese words": ["一只 狗 在 草地 上 奔跑 。", "两 个 人 骑 自行车"],
    "Chinese characters": ["一 只 狗"],
    "Japanese words": ["スケートボード に 乗る 男性", "犬 が 走る"],
    "Thai words": ["ผู้ชาย กำลัง ขี่ จักรยาน บน ถนน", "สุนัข วิ่ง บน หญ้า"],
    "Burmese words": ["ခွေး တစ် ကောင် မြက် ပေါ်တွင် ပြေး နေ သည်"],
    "numbers": ["007", "42"],
    "nothing": [],
}


@pytest.mark.parametrize("captions", WITHOUT_SPACES.values(), ids=WITHOUT_SPACES)
def test_captions_without_spaces_are_recognised(captions):
    assert first_without_spaces(captions) in captions


@pytest.mark.parametrize("captions", WITH_SPACES.values(), ids=WITH_SPACES)
def test_captions_with_spaces_are_no_false_alarm(captions):
    assert first_without_spaces(captions) is None


def test_chinese_is_refused_with_the_remedy_and_scored_if_a_tokenizer_is_named():
    with pytest.raises(InputError, match="'一只狗在草地上奔跑。' have no spaces.*--tokenize characters"):
        References(CHINESE)
    assert References(CHINESE, tokenize="ptb").score(PREDICTIONS)["cider"] == 0  # what the toolkit says


def test_scores_of_characters_equal_the_toolkits_for_separated_characters():
    pytest.importorskip("pycocoevalcap", reason="needs pycocoevalcap (the extra [java]) to compare with")
    scores = References(CHINESE, tokenize="characters").score(PREDICTIONS, per_image=True)

    def separate(text: str) -> str:
        return " ".join(text.replace(" ", ""))

    expected = toolkit_scores(list(map(separate, PREDICTIONS)), [list(map(separate, texts)) for texts in CHINESE])
    assert scores["bleu_4"] > 0.3 and scores["cider"] > 1
    assert_equal(scores, expected)


def test_a_function_splits_captions_into_tokens():
    as_function = References(CHINESE, tokenize=lambda captions: [list(text.replace(" ", "")) for text in captions])
    assert as_function.score(PREDICTIONS) == References(CHINESE, tokenize="characters").score(PREDICTIONS)


def test_a_tokenizer_of_transformers_splits_captions_into_tokens(tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path)
    references = References([["a red star"], ["two dogs"]], tokenize=str(tmp_path))
    tokens = tiny.tokenizer().tokenize
    assert references.tokens == [tokens("a red star"), tokens("two dogs")]
    with pytest.raises(InputError, match="The tokenizer '/no/such/folder' cannot be loaded: choose ptb, characters"):
        References(CHINESE, tokenize="/no/such/folder")


def test_the_metric_of_evaluate_takes_the_tokenizer():
    metric = CaptionMetrics(keep_in_memory=True)
    scores = metric.compute(predictions=PREDICTIONS, references=CHINESE, tokenize="characters")
    assert scores == References(CHINESE, tokenize="characters").score(PREDICTIONS)


def test_document_frequencies_of_other_tokens_are_refused(tmp_path):
    References(CHINESE, tokenize="characters").document_frequencies().save(tmp_path / "df.json.gz")
    table = DocumentFrequencies.load(tmp_path / "df.json.gz")
    assert table.tokenizer == "characters"
    with pytest.raises(InputError, match="are of the tokenizer 'characters', not 'ptb'"):
        References([["a dog"]], table)
    same = References(CHINESE, table, "characters").score(PREDICTIONS)
    assert same == pytest.approx(References(CHINESE, tokenize="characters").score(PREDICTIONS))


def test_the_tokenizer_is_stored_with_the_scores(tmp_path, capsys):
    predictions = [{"image_id": image, "caption": text} for image, text in enumerate(PREDICTIONS)]
    (tmp_path / "predictions.json").write_text(json.dumps(predictions))
    ReferenceSet(dict(enumerate(CHINESE))).write(tmp_path / "references.json")
    files = ["--predictions", f"{tmp_path}/predictions.json", "--references", f"{tmp_path}/references.json"]
    with pytest.raises(InputError, match="--tokenize characters"):
        eval_captions.evaluate(files)
    more = ["--tokenize", "characters", "--output", f"{tmp_path}/scores.json", "--report", f"{tmp_path}/report.html"]
    eval_captions.evaluate([*files, *more])
    content = json.loads((tmp_path / "scores.json").read_text())
    assert content["scores"] == References(CHINESE, tokenize="characters").score(PREDICTIONS)
    assert content["tokenizer"] == "characters, without white space"
    assert "Tokens: characters, without white space." in capsys.readouterr().out
    assert "characters, without white space" in (tmp_path / "report.html").read_text()


def test_every_domain_is_scored_with_the_same_tokenizer():
    references = ReferenceSet(dict(enumerate(CHINESE)), domains={0: "near", 1: "near", 2: "far"})
    scored = score_captions(dict(enumerate(PREDICTIONS)), references, tokenize="characters")
    near = References(CHINESE[:2], tokenize="characters").score(PREDICTIONS[:2])
    assert scored.parts["near"].scores == near


def test_metrics_that_read_english_words_are_refused():
    options = ["--predictions", "a", "--references", "b", "--tokenize", "characters", "--extra_metrics", "meteor"]
    with pytest.raises(InputError, match="meteor and spice read English words only"):
        eval_captions.evaluate(options)
