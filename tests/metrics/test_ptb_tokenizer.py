"""The tokenizer in pure Python gives the tokens of the Java program that the COCO caption toolkit runs (the jar)."""

# ruff: noqa: SIM905
import importlib.util
import json
import pathlib
import random
import shutil
import subprocess

import pytest

from qformer_captioner.metrics.ptb_tokenizer import PUNCTUATION, tokenize

# Characters at which the jar starts a new line. Our tokenizer takes them for spaces.
SEPARATORS = "\n\v\f\r\u2028\u2029"

# Captions and their tokens by the jar, which read them as one file: a few tokens depend on the next caption.
GOLDEN = [
    json.loads(line)
    for line in (pathlib.Path(__file__).parents[1] / "fixtures" / "ptb_golden.jsonl").read_text("utf-8").splitlines()
]


# ---------------------------------------------------------------------------------------------------------------------
# Fuzz: generated captions with inserted signs, numbers, abbreviations ...
# ---------------------------------------------------------------------------------------------------------------------
NOUNS = (
    "man woman dog cat child boy girl horse bus train plate pizza table bench street kite wave snowboard umbrella "
    "giraffe elephant clock tower kitchen sink laptop bicycle airplane bird sheep cow sandwich cake vase couch hat"
).split()
ADJECTIVES = "small large red old young wooden black grassy wet busy empty half-eaten well-lit multi-colored".split()
VERBS = "riding holding eating watching sitting standing walking flying jumping playing parked sleeping wearing".split()
PLACES = "on in near under beside with behind over".split()


def caption(rng: random.Random) -> str:
    words = [rng.choice(["A", "The", "Two", "There is a", "An", "a", "the"]), rng.choice(ADJECTIVES), rng.choice(NOUNS)]
    words += [rng.choice(VERBS), rng.choice(PLACES), rng.choice(["a", "his"]), rng.choice(NOUNS)]
    if rng.random() < 0.5:
        words += [rng.choice(["and", "while", "next to"]), "a", rng.choice(ADJECTIVES), rng.choice(NOUNS)]
    return " ".join(words) + rng.choice([".", ".", "", " .", "!"])


def put(rng: random.Random, text: str, things: list[str], where: str = "") -> str:
    """Insert one to three of the strings into a text: as words, before or after words, or inside them."""
    words = text.split(" ")
    where = where or rng.choice(["word", "before", "behind", "inside"])
    for _ in range(rng.randint(1, 3)):
        thing, at = rng.choice(things), rng.randrange(len(words))
        if where == "word":
            words.insert(at, thing)
        else:
            cut = {"before": 0, "behind": len(words[at])}.get(where, rng.randint(0, len(words[at])))
            words[at] = words[at][:cut] + thing + words[at][cut:]
    return " ".join(words)


def wrap(rng: random.Random, text: str, pairs: list[list[str]]) -> str:
    words = text.split(" ")
    first = rng.randrange(len(words))
    last = rng.randint(first, min(len(words) - 1, first + 3))
    left, right = rng.choice(pairs)
    words[first], words[last] = left + words[first], words[last] + right
    return " ".join(words)


SPACES = ["  ", "   ", " \xa0 ", *"\t\xa0\u200b\u200c\u200d\u2060\ufeff\xad\u2003\u2009\u202f\u3000\u180e\x7f\0\x1f"]
JUNK = [*"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", ". . ."]
JUNK += "-- --- ------ ... .. .... !! ?! ??? '' `` ** == -> => <- :: // \\n ~~ $$ () [] {} <> && || ++".split()
JUNK += "(s) /s -lrb- -RSB- ;) :( :-) :D <3 ^_^ (^-^)".split()
TYPOGRAPHY = [*"“”‘’–—…«»‹›‚„′″·•©®™°½¼¾±×÷§¶†‡€£¥¢¤¿¡²³", "““", "’s", "n’t", "‘tis", "’90s"]
PAIRS = "“” ‘’ «» „“ () [] <> '' \"\" ** __ `` ~~ ||".split()
EMOJI = "😀 ❤️ 👍🏽 👨‍👩‍👧‍👦 🇺🇸 🏳️‍🌈 ☀ ☃️ ✓ ✔️ ★ ♥ → ⚽ ✨ 1️⃣ #️⃣ ©️ ‼️ ▶ ● ■ ✅ 🤷🏻‍♀️ 𝐛𝐨𝐥𝐝".split()
ENTITIES = (
    "&amp; &lt; &gt; &quot; &apos; &nbsp; &#39; &#x27; &#8217; &mdash; &ndash; &hellip; &rsquo; &ldquo; &eacute; "
    "&ouml; &copy; &deg; &AMP; &amp;amp; &amp <b> </b> <br> <br/> <i> <p> <s> </s> <unk> <|end|> <image> [CLS] <eos> "
    "<3 <1>"
).split()
ENTITIES += ["<br />", "<a href='y'>", '<div class="x">', "< b >", "<!-- x -->"]
MARKDOWN = ",# ,## ,- ,* ,1. ,2) ,> ,| ,```,```python ,Caption: ,**Caption:** ,(a) ".split(",")
MARKDOWN_PAIRS = "** **,* *,_ _,__ __,` `,~~ ~~,*** ***,[ ](http://example.com/a_b),![ ](a.png)".split(",")
WEB = (
    "http://example.com https://example.com/a/b?c=d&e=f#g. www.example.com www.example.com/a foo.com example.org/path "
    "me@example.com john.doe+x@mail.co.uk @user @user_name #tag #Tag2019 #1 photo.jpg IMG_001.JPG 001.png file.tar.gz "
    "(http://example.com) <me@example.com> user@host x.com:80 /usr/bin C:\\a\\b.txt 10.0.0.1 v1.2.3 gpt-4 llava-1.5-7b"
).split()
NUMBERS = ["10 a.m.", "1 1/2", "(800) 555-1212", "+44 20 7946 0958", "No. 5", "100 200 3000", "20 30 40"]
NUMBERS += (
    "1 12 1,000 3.5 .5 12:30 5:54pm 10am 1/2 3/4 10-1/2 1st 22nd 1990s '90s 20's $5 $5.00 US$5 £5 5€ 5¢ 10% 24/7 10-12 "
    "10–12 2x4 4K 5ft 5'10\" 6' 555-1212 800-555-1212 (800)555-1212 01/02/2013 2013-01-02 #5 no.5 -5 +5 10°C 72°F "
    "3.5mm 12\" 16:9 3:00PM 1_000 5th. 5., ½ 1½ ¼ 1⁄2 10^2 1000's F-16 B-52 747"
).split()
ABBREVIATIONS = (
    "Mr. Mrs. Dr. St. Ave. Blvd. Jr. Inc. Co. etc. vs. U.S. u.s. D.C. L.A. T.V. t.v. a.m. P.M. i.e. e.g. J.R.R. Ph.D. "
    "No. no. pp. fig. Jan. Sat. Calif. Pa. Mass. ft. in. oz. Mt. Gen. A. B. x. I. art. R&B AT&T H&M M&M's b&w C++ C# "
    "A+ USA w/ w/o c/o and/or s/he km/h U.K. a.k.a. mfg. pty. Ltd. ill. Ill."
).split()
SCRIPTS = (
    "café naïve jalapeño Zürich crème œuvre ﬁsh ß STRASSE İstanbul Привет ПРИВЕТ 猫 日本語 カタカナ 한국어 "
    "中文。 「本」 שלום مرحبا नमस्ते สวัสดี cafe\u0301 n\u0303 ｆｕｌｌ！ ３ ٣ É l'été d'été l’été jusqu'à Hawai'i Hawaiʻi "
    "É.U. é.é. x² ²³"
).split()
CONTRACTIONS = (
    "don't isn't can't won't it's he's she'll they're we've I'm I'd man's dogs' 'tis 'til 'em rock'n'roll o'clock "
    "O'Brien ma'am y'all '90s cannot gonna wanna gotta gimme lemme dunno ain't couldn't've who'd've 'twas c'mon 'cause "
    "'n' ol' ne'er cap'n James' s'more s'mores d'art l'eau jack-o'-lantern li'l e'er goin' 'bout gov't n't 's 'd 'll "
    "Dunkin'"
).split()

FUZZ = {
    "spaces": lambda rng, text: put(rng, text, SPACES),
    "junk as words": lambda rng, text: put(rng, text, JUNK, "word"),
    "junk glued": lambda rng, text: put(rng, text, JUNK, rng.choice(["before", "behind", "inside"])),
    "typography": lambda rng, text: wrap(rng, put(rng, text, TYPOGRAPHY), PAIRS),
    "emoji": lambda rng, text: put(rng, text, EMOJI),
    "entities": lambda rng, text: put(rng, text, ENTITIES),
    "markdown": lambda rng, text: rng.choice(MARKDOWN) + wrap(rng, text, [pair.split(" ") for pair in MARKDOWN_PAIRS]),
    "web": lambda rng, text: put(rng, text, WEB),
    "numbers": lambda rng, text: put(rng, text, NUMBERS),
    "abbreviations": lambda rng, text: put(rng, text, ABBREVIATIONS) + rng.choice(["", " The end.", " the end.", ","]),
    "scripts": lambda rng, text: put(rng, text, SCRIPTS),
    "separators": lambda rng, text: put(rng, text, [*SEPARATORS, "\r\n", "\x1c", "\x85"]),
    "contractions": lambda rng, text: put(rng, text, CONTRACTIONS),
    "typographic contractions": lambda rng, text: put(
        rng, text, [word.replace("'", rng.choice("’’‘`´")) for word in CONTRACTIONS]
    ),
    "capitals": lambda rng, text: rng.choice([str.upper, str.title, str.swapcase])(
        put(rng, text, CONTRACTIONS + ABBREVIATIONS, "word")
    ),
}


def mixed(rng: random.Random, text: str) -> str:
    for _ in range(rng.randint(2, 4)):
        text = rng.choice(list(FUZZ.values()))(rng, text)
    return text


FUZZ_CLASSES = [*FUZZ, "mixed"]


def fuzz(name: str, count: int, seed: int = 0) -> list[str]:
    rng = random.Random(f"{name} {seed}")
    return [FUZZ.get(name, mixed)(rng, caption(rng)) for _ in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# The jar
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def jar(tmp_path_factory):
    """Function that returns the jar's tokens of captions, read as one file."""
    toolkit = importlib.util.find_spec("pycocoevalcap")
    if not shutil.which("java") or toolkit is None:
        pytest.skip("needs java and pycocoevalcap, whose jar is the reference")
    path = pathlib.Path(toolkit.submodule_search_locations[0]) / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    file = tmp_path_factory.mktemp("ptb") / "captions.txt"
    command = ["java", "-cp", str(path), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]

    def tokens(captions: list[str]) -> list[list[str]]:
        as_spaces = str.maketrans(dict.fromkeys(SEPARATORS, " "))
        file.write_text("\n".join(text.translate(as_spaces) for text in captions), "utf-8")
        done = subprocess.run([*command, str(file)], check=True, capture_output=True)
        lines = done.stdout.decode().split("\n")[: len(captions)]
        assert len(lines) == len(captions)
        return [[token for token in line.rstrip().split(" ") if token not in PUNCTUATION] for line in lines]

    return tokens


def differing(captions: list[str], expected: list[list[str]]) -> list[tuple[str, list[str], list[str]]]:
    triples = zip(captions, expected, tokenize(captions), strict=True)
    return [(text, theirs, ours) for text, theirs, ours in triples if theirs != ours]


@pytest.fixture(scope="session")
def fuzzed(jar):
    captions = {name: fuzz(name, 1000) for name in FUZZ_CLASSES}
    tokens = iter(jar([text for texts in captions.values() for text in [*texts, "a dog"]]))
    return {name: (texts, [next(tokens) for _ in [*texts, "a dog"]][:-1]) for name, texts in captions.items()}


def real_captions(shared: pathlib.Path) -> dict[str, list[str]]:
    coco = shared / "data" / "coco_karpathy_test"
    sets = {"references": json.loads((coco / "captions_karpathy_test.json").read_text("utf-8"))["annotations"]}
    sets |= {path.stem: json.loads(path.read_text("utf-8")) for path in sorted((coco / "predictions").glob("*.json"))}
    captions = {name: [entry["caption"] for entry in entries] for name, entries in sets.items()}
    rows = (shared / "data" / "flickr8k" / "metadata.jsonl").read_text("utf-8").splitlines()
    captions["flickr8k"] = [text for row in rows for text in json.loads(row)["captions"]]
    return captions


@pytest.mark.slow
def test_real_captions_have_the_tokens_of_the_jar(shared, jar):
    captions = [text for texts in real_captions(shared).values() for text in texts]
    assert len(captions) > 59_000
    assert not differing(captions, jar(captions))


@pytest.mark.slow
@pytest.mark.parametrize("name", FUZZ_CLASSES)
def test_fuzzed_captions_have_the_tokens_of_the_jar(name, fuzzed):
    captions, expected = fuzzed[name]
    wrong = differing(captions, expected)
    assert len(wrong) <= 0.01 * len(captions), wrong[:5]


@pytest.mark.slow
def test_the_golden_tokens_are_those_of_the_jar(jar):
    assert jar([entry["caption"] for entry in GOLDEN]) == [entry["tokens"] for entry in GOLDEN]


# ---------------------------------------------------------------------------------------------------------------------
# Without Java
# ---------------------------------------------------------------------------------------------------------------------
def test_golden_captions_have_the_golden_tokens():
    captions, expected = ([entry[key] for entry in GOLDEN] for key in ("caption", "tokens"))
    assert not differing(captions, expected)


QUIRKS = {
    "brackets stay, because the toolkit drops them in capitals only": (
        "a (red) [x] {y}",
        "a -lrb- red -rrb- -lsb- x -rsb- -lcb- y -rcb-",
    ),
    "runs of ! and ? stay, single ones are dropped": ("no! what? wow!! really?!", "no what wow !! really ?!"),
    "signs stay": ("# $ % & * + / < = > @ \\ ^ _ | ~", "# $ % & * + / < = > @ \\ ^ _ | ~"),
    "emoji are dropped, signs of the basic plane stay": ("a 😀 dog ❤️ ✓", "a dog ❤ ✓"),
    "two typographic quotes in a row stay": ("““hi””", "```` hi ''''"),
    "five hyphens stay, four are dropped": ("a ---- b ----- c", "a b ----- c"),
    "a full stop between letters joins": ("A man.A dog", "a man.a dog"),
    "a full stop before a comma stays": ("a dog., a cat", "a dog. a cat"),
    "a full stop before an ideographic comma stays": ("a dog.、 a cat", "a dog. 、 a cat"),
    "clitics": ("the dog's couldn’t've been", "the dog 's could n't 've been"),
    "split words": ("cannot gonna", "can not gon na"),
    "currencies": ("£5 5€ 5¢", "# 5 5 $ 5 cents"),
    "a fraction holds a no-break space": ("1 1/2 cups", "1\xa01/2 cups"),
    "a telephone number holds a no-break space": ("(800) 555-1212", "-lrb-800-rrb-\xa0555-1212"),
    "a tag is one token": ("<b and c> d", "<b\xa0and\xa0c> d"),
    "entities": ("A&amp;M caf&eacute; &#39; &hellip;", "a&m caf&eacute; &#39; & hellip ;"),
    "a soft hyphen vanishes": ("multi\xadcolored", "multicolored"),
    "zero-width characters split words": ("a\u200bdog", "a dog"),
}


@pytest.mark.parametrize("quirk", QUIRKS)
def test_quirk(quirk):
    text, expected = QUIRKS[quirk]
    assert tokenize([text]) == [[token for token in expected.split(" ") if token != ";"]]


# Rules that need a character after their token do not apply at the end of the last caption, which ends no line.
LAST = {
    "two cats they've": "two cats they ve",
    "who'd've": "who 'd ve",
    "the dog's": "the dog 's",
    "a dog :)": "a dog -rrb-",
    "summer of '69": "summer of 69",
    "rock 'n": "rock 'n",
    "001.jpg": "001 jpg",
}


@pytest.mark.parametrize("caption", LAST)
def test_the_last_caption(caption):
    assert tokenize(["a dog", caption])[1] == LAST[caption].split(" ")


@pytest.mark.slow
@pytest.mark.parametrize("caption", LAST)
def test_the_tokens_of_the_last_caption_are_those_of_the_jar(caption, jar):
    assert jar(["a dog", caption])[1] == LAST[caption].split(" ")


def test_a_full_stop_may_depend_on_the_next_caption():
    assert tokenize(["vitamin C.", "a dog"])[0] == ["vitamin", "c."]
    assert tokenize(["vitamin C.", "A dog"])[0] == ["vitamin", "c"]
    assert tokenize(["pier No.", "5 dogs"])[0] == ["pier", "no."]
    assert tokenize(["pier No.", "five dogs"])[0] == tokenize(["pier No."])[0] == ["pier", "no"]


@pytest.mark.parametrize("separator", [*SEPARATORS, "\r\n", "\x1c", "\x1d", "\x1e", "\x85"], ids=ascii)
def test_a_line_separator_shifts_no_caption(separator):
    tokens = tokenize([f"a dog{separator}runs", f"{separator}", "two cats"])
    assert tokens == [["a", "dog", "runs"], [], ["two", "cats"]]


def test_any_string_gives_one_list_of_non_empty_tokens():
    rng = random.Random(0)
    ranges = [(0, 0x7F), (0, 0x7F), (0x80, 0x24F), (0x2000, 0x2BFF), (0, 0xFFFF), (0xD800, 0xDFFF), (0, 0x10FFFF)]
    captions = ["".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, 40))) for _ in range(5_000)]
    tokens = tokenize(captions)
    assert len(tokens) == len(captions)
    assert all(token and not set(token) & set(" \n\t\v\f\r") for line in tokens for token in line)


def test_a_caption_that_ends_in_a_space_does_not_depend_on_the_next_ones():
    captions = [f"{text} " for text in fuzz("mixed", 300)]  # a few rules need a character after the last word
    assert [tokenize([text])[0] for text in captions] == [tokenize([text, "", ""])[0] for text in captions]


def test_plain_captions_have_the_tokens_that_the_rules_give():
    captions = [text for name in ("abbreviations", "contractions") for text in fuzz(name, 2000)]
    captions += [text.replace("-", " ") for text in fuzz("capitals", 2000)]
    scanned = [tokenize([f"{text} \N{GRINNING FACE}"]) for text in captions]
    assert [tokenize([f"{text} "]) for text in captions] == scanned


def test_no_captions():
    assert tokenize([]) == []
    assert tokenize(["", " ", "."]) == [[], [], []]
