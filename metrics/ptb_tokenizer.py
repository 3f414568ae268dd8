"""The tokens of the COCO caption toolkit, without Java.

The toolkit runs captions through the Penn Treebank tokenizer of Stanford CoreNLP 3.4.1 (`-preserveLines -lowerCase`)
and then drops punctuation; every published CIDEr, BLEU and ROUGE-L of captions is over those tokens. `tokenize` gives
the same tokens. Its rules were found by feeding lines to that program and reading the tokens that came out, as a black
box: no source code of CoreNLP, which is under the GPL, was read or copied.

How it works: a caption without surprises (words, commas, a final full stop) is lower-cased and split. Any other is
scanned from left to right: the rules for what begins with such a character are tried, the longest match wins, and of
two equally long ones the earlier rule. As in the original, text that a rule looks at behind its token counts into the
length.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

# What the toolkit drops. Its list has -LRB-, -RRB-, -LCB- and -RCB- too, but the tokens are lower case by then:
# brackets stay. So do "!!" and "?!".
PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", ""])

# ---------------------------------------------------------------------------------------------------------------------
# Characters. The rules see a shadow of the text, as long as the text itself, in which a character outside ASCII is
# replaced by the one that stands for its kind. Tokens are cut out of the text itself.
# ---------------------------------------------------------------------------------------------------------------------
LETTER, MARK, DIGIT, SYMBOL, SUPERSCRIPT, SUBSCRIPT, SPACE, DROPPED = "λ\u0301٣§²₂\u2003\0"

# Line separators, at which the original would start a line too many, are spaces here: a caption stays one line.
_SEPARATORS = dict.fromkeys(map(ord, "\n\v\f\r\u2028\u2029"), " ")
# Outside ASCII, characters that rules name. Others are sorted into kinds by the ranges below or, failing that, by
# Unicode category; what is none of these kinds, such as an emoji, is dropped.
_NAMED = "\xa0\xad¢£¤¼½¾\u2010\u2011\u058a–—―‘’‚‛“”„‟«»‹›…、⁄⅓⅔€₠٫٬\x80\x85\x91\x92\x93\x94\x96\x97"
_KINDS = {
    LETTER: "1885-1886",
    SPACE: "2000-200a 3000",
    SUPERSCRIPT: "b2-b3 b9 2070 2074-2079",
    SUBSCRIPT: "2080-2089",
    SYMBOL: (  # one token each
        "a1 a5-a9 ac ae-b1 b4 b6-b8 bf d7 f7 37e 387 589 5be 5c0 5c3 5c6 5f3-5f4 600-603 606-60c 614 61b 61e-61f 66a "
        "66d 6d4 700-70d 7f6-7f8 964-965 e3f e4f 1fbd 2016-2017 2020-2023 2030-2038 203b 203e-2042 207a-207e 208a-208e "
        "20a4 2100-2101 2103-2106 2108-2109 2114 2116-2118 211e-2123 2125 2127 2129 212e 213a-213b 2140-2144 214a-214d "
        "214f 2155-215e 2190-2bff 3001-3002 3012 30fb ff01-ff0f ff1a-ff20 ff3b-ff40 ff5b-ff65 ffe0-ffe1 ffe5-ffe6"
    ),
    MARK: (  # part of a word, though not a letter
        "2c2-2c5 2d2-2df 2e5-2eb 2ed 2ef-36f 375 378-379 384-385 3f6 483-487 55a-55f 591-5bd 5bf 5c1-5c2 5c4-5c5 5c7 "
        "615-61a 64b-65e 670 6d6-6e4 6e7-6ed 6fd-6fe 70f 711 730-74c 7a6-7b0 7eb-7f3 900-903 93c 93e-94e 951-955 "
        "962-963 981-983 9bc 9be-9c4 9c7-9c8 9cb-9cd 9d7 9e2-9e3 a01-a03 a3c a3e-a4f a81-a83 abc abe-acf b82 bbe-bc2 "
        "bc6-bc8 bca-bcd c01-c03 c3e-c56 d3e-d44 d46-d48 e31 e34-e3a e47-e4e eb1 eb4-ebc ec8-ecd"
    ),
    DROPPED: (  # letters and digits younger than the original
        "37f 528-52f 560 588 5ef 860-89f 8a1 8ad-8c9 978 980 9fc af9 c34 c5a-c5d c80 cdd d04 d54-d5f de6-def e86 e89 "
        "e8c e8e-e93 e98 ea0 ea8-ea9 eac 13f5-13fd 16f1-16f8 170d 171f 1878 191d-191e 19b0-19c0 19c8-19c9 1b4c "
        "1c80-1cbf 1cf2-1cf3 1cfa 2c2f 2c5f 312e-312f 31bb-31bf 4db6-4dbf 9fcd-9fff a698-a69d a78f a794-a79f a7ab-a7f7 "
        "a8fd-a8fe a9e0-a9fe aa7e-aa7f ab30-abbf"
    ),
}


class _Shadow(dict[int, str]):
    """A table for `str.translate`, filled as characters turn up."""

    def __init__(self) -> None:
        super().__init__({code: chr(code) if code in (9, 10) or 31 < code < 127 else DROPPED for code in range(128)})
        for kind, ranges in _KINDS.items():
            for part in ranges.split():
                first, _, last = part.partition("-")
                self.update(dict.fromkeys(range(int(first, 16), int(last or first, 16) + 1), kind))
        self.update({ord(char): char for char in _NAMED})

    def __missing__(self, code: int) -> str:
        kind, char = DROPPED, chr(code)
        if code <= 0xFFFF:  # beyond, everything is dropped
            kind = DIGIT if unicodedata.category(char) == "Nd" else LETTER if char.isalpha() else DROPPED
        self[code] = kind
        return kind


_SHADOW = _Shadow()

# ---------------------------------------------------------------------------------------------------------------------
# Fragments of the rules. L, N, A are the insides of character classes.
# ---------------------------------------------------------------------------------------------------------------------
A = "A-Za-z"
L = f"{A}{LETTER}"
N = f"0-9{DIGIT}"
APOSTROPHE = "(?:['’\x92]|&(?i:apos);)"
QUOTE = "(?:['’\x92‘‛\x91`]|&(?i:apos);)"  # these pass for an apostrophe inside a word: d`Artagnan
BLANK = " \t\n\xa0"
SPACES = BLANK + SPACE
NEXT = f"[{SPACES}\x85]"  # may be the end of the line: a rule may look at the next caption's first word
ACCENTED = "&(?i:[aeiou](?:acute|grave|uml));"  # caf&eacute; is one token, as it stands
WORD = f"(?:[{L}{MARK}\xad]|{ACCENTED})(?:[{L}{MARK}\xad{N}]|{ACCENTED})*+"  # \xad, the soft hyphen, goes when written
NUMBER = f"[{N}]*(?:[.,:٫٬\xad]?[{N}]+)(?:[.,:٫٬\xad][{N}]+)*"
PART = f"(?:[dolDOL]{QUOTE}[{L}{N}]{{2}}[{L}{N}]*+|[{L}{N}]++)"  # of a word with hyphens
COMPOUND = f"{PART}(?:[-_\u2010\u2011\u058a]{PART})*+"
DOTTED = f"{WORD}(?:[.!?]{WORD})++"
HYPHENS_BEHIND_DOTS = f"[{A}0-9][{A}0-9.,\xad]{{0,99}}+(?:-(?:(?:[{A}]\\.){{2,}}|[{A}0-9\xad]++))+"
AMPERSANDS = "[A-Z]++(?:(?:&(?i:amp);|[&+])[A-Z]+)+"
NAME = "[A-Za-z][A-Za-z0-9_:.-]*+"
ATTRIBUTE = f"""{NAME}(?: *+= *+(?:"[^"\n]*"|'[^'\n]*'))?"""
TAG = f"<{NAME}(?: ++{ATTRIBUTE})* *+(?:/ *+)?>|</{NAME} *+>|<[!?][A-Za-z-][^>\n]{{0,500}}>"
URL_PATH = '/[^ \t\n"<>|()]+[^ \t\n"<>|.!?(){},-]'
ADDRESS = f'[^{BLANK}"<>|(){{}}.]++'  # a part of an e-mail address


def _one_of(words: str) -> str:
    return "(?:" + "|".join(map(re.escape, words.split())) + ")"


# Abbreviations keep their full stop. (Where a sentence ends with one of the second list, the original writes one full
# stop more, which is dropped.)
TITLES = (
    "adj adm adv alex assoc asst atty ave brig capt cf cie cmdr col comdr cpl dept det dr drs elec ens ft gen gov govs "
    "hon insp invt jos lieut lt maj messrs mlle mme mr mrs ms msgr mt natl pfc ph pres prof profs pvt rep reps rev sen "
    "sens sfc sgt spc st ste supt supts treas vs wm"
)
ENDINGS = (
    "al ala apr ariz assn aug bhd bldg blvd bros calif co colo conn corp cos ct dak dec ed.d esq est etc ext feb "
    "fla fri ga inc ind intl jan jr jul jun kan kans ky ltd mar md mich minn mo mon mont neb nev nov oct okla "
    "penn ph.d plc rd rt sep sept seq sq sr sys tel tenn thu thurs tue tues univ va vt wed wis wisc wyo"
)
STATES = "ark az del ill la mass miss ore pa tex wash"  # if they begin with a capital: "ill." is a word
BEFORE_NUMBERS = "art ca fig figs no nos op pp prop"  # No. 5, but "no."
ENDING = f"(?:(?i:{_one_of(ENDINGS)})|(?=[A-Z])(?i:{_one_of(STATES)})|[pP]{{1,2}}[tT][ey][sS]?)\\."  # Pty., Ptes.
ABBREVIATIONS = frozenset(
    " ".join([TITLES, ENDINGS, STATES, BEFORE_NUMBERS, "pty ptys pte ptes ppty pptys ppte pptes mfg mtg"]).split()
)
SPLIT_WORDS = frozenset(["cannot", "gonna", "gotta", "wanna", "gimme", "lemme"])
# After these a single letter and its full stop are a word and the end of a sentence: "vitamin C. The".
SENTENCE_STARTS = (
    "A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Mr. Ms. Now "
    "Once One Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You"
)
START = "|".join(f"{word[0]}(?i:{re.escape(word[1:])})" for word in SENTENCE_STARTS.split())
EXTENSIONS = (
    "bat bmp c cgi class cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov pdf php pl png ppt ps py sql tar "
    "txt wav x xml zip"
)

# ---------------------------------------------------------------------------------------------------------------------
# Writing. Tokens are lower-cased afterwards.
# ---------------------------------------------------------------------------------------------------------------------
_WRITTEN = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_WRITTEN |= {"€": "$", "₠": "$", "¤": "$", "\x80": "$", "£": "#", "¢": "cents"}
_WRITTEN |= {"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "\xad": "-"}
_WRITTEN |= {'"': "''", "–": "--", "—": "--", "―": "--", "\x96": "--", "\x97": "--", "…": "...", "\x85": "..."}
_WRITTEN |= dict.fromkeys("\u2010\u2011\u058a٫٬", "")
_QUOTES = {"‘": "`", "‛": "`", "‹": "`", "\x91": "`", "’": "'", "›": "'", "\x92": "'"}
_QUOTES |= {"“": "``", "«": "``", "\x93": "``", "”": "''", "»": "''", "\x94": "''"}
_TO_QUOTES = str.maketrans(_QUOTES)
_TO_BRACKETS = str.maketrans({"(": "-lrb-", ")": "-rrb-"})
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&nbsp;": "", "&quot;": "'", "&apos;": "'"}
_AMPERSAND = re.compile("&amp;", re.IGNORECASE)


def _plainly(text: str) -> str:
    return _AMPERSAND.sub("&", text.replace("\xad", "") or "-")


def _straight(text: str) -> str:
    return text.replace("\xad", "").replace("&apos;", "'").translate(_TO_QUOTES)


def _quotes(text: str) -> str:
    return text.translate(_TO_QUOTES)


def _brackets(text: str) -> str:
    return text.translate(_TO_BRACKETS)


def _unbroken(text: str) -> str:
    return text.replace(" ", "\xa0")


class Rule(NamedTuple):
    """A kind of token, and how it is written.

    If the pattern has a group, the token is what the group took; what the pattern took behind it only counts into the
    length.
    """

    name: str
    pattern: re.Pattern[str]
    write: Callable[[str], str]


def _rule(name: str, pattern: str, write: Callable[[str], str] = _plainly) -> Rule:
    return Rule(name, re.compile(pattern), write)


# Rules for what begins with a letter or a digit.
WORDS = [
    # words, and where they end before a clitic
    _rule("word cut in two", "(?i:(can)not|(gon|wan)na|(got)ta|(gim|lem)me)"),  # gonna -> gon | na
    _rule("before a clitic", f"([{L}\xad]+){APOSTROPHE}(?i:[sdm]|ll|re|ve)"),  # y's -> y | 's, though y'all -> y' | all
    _rule("before n't", f"([{A}\xad]*[A-MO-Za-mo-z]\xad*)[nN]{QUOTE}[tT]"),  # didn't -> did | n't
    _rule("n't", f"(?i:n{QUOTE}t)", _straight),
    # apostrophes that stay
    _rule("name", f"[A-HJ-XZn]{QUOTE}[{L}]{{2,}}"),  # O'Brien, D'Angelo, N'Sync
    _rule("between vowels", f"[{L}]+[aeiouyAEIOUY]{QUOTE}[aeiouA-Z][{L}]*"),  # Hawai'i, ma'am
    _rule(
        "words with it",
        f"(?i:c'mon|nat'l|e'er|ev'ry|li'l|s'mores|(?:somethin|dunkin|ol|[djl]){APOSTROPHE}"
        f"|cap{APOSTROPHE}n|c{APOSTROPHE}est)",
    ),
    _rule("o'o", f"[oO]{QUOTE}[oO]"),
    _rule("y'all", f"([yY]{APOSTROPHE})[{L}]"),  # y' | all
    # abbreviations
    _rule("ending", f"({ENDING})(?:[^{L}{MARK}{BLANK}]?[^{BLANK}])?"),  # etc.; Jr.A -> jr. | a
    _rule("title", f"(?:(?i:{_one_of(TITLES)})|[mM][ft][gG])\\."),  # Mr.
    _rule("before a number", f"((?i:{_one_of(BEFORE_NUMBERS)})\\.){NEXT}?[{N}]"),  # No. 5
    _rule("acronym", f"(?:[{A}]\\.)+"),  # U.S., a.m., J.
    _rule("initial at a sentence's end", f"([{A}])\\.{NEXT}+(?:{START}|{TAG}){NEXT}"),  # vitamin C. The
    # words joined by signs
    _rule("compound", COMPOUND),  # black-and-white, jack-o'lantern, under_score
    _rule("hyphens behind dots", HYPHENS_BEHIND_DOTS),  # 1.5-mile
    _rule(
        "slash", f"[{A}0-9]++(?:-[{A}]++){{0,2}}(?:\\\\?/[{A}0-9]++(?:-[{A}]++){{0,2}}){{1,2}}"
    ),  # 24/7, w/o, either/or
    _rule("ampersand", AMPERSANDS),  # AT&T
    _rule("s&ls", "(?i:s&(?:amp;)?ls)"),
    _rule("language", r"[cCfF]#|[cC]\+\+"),
    _rule("currency", r"[A-Z]+\$"),  # US$5 -> us$ | 5
    _rule("file", f"[{L}{N}\xad]++(?:\\.[{L}{N}]+)*\\.(?i:{_one_of(EXTENSIONS)})(?={NEXT}|[.,!?])", str),  # 001.jpg
    _rule("fraction", f"(?:[{N}]{{1,4}}[- \xa0])?[{N}]{{1,4}}[/⁄][{N}]{{1,4}}", _unbroken),  # 1 1/2 is one token
    _rule("date", f"[{N}]{{1,2}}[-/][{N}]{{1,2}}[-/][{N}]{{2,4}}"),
    # the web
    _rule("http", r"(?i:https?)://[^ \t\n\"<>|(){}]+[^ \t\n\"<>|.!?(){},-]", str),
    _rule("www", f'(?i:www)\\.(?:[^ \t\n"<>|.!?(){{}},]++\\.)+[{A}]{{2,4}}'),
    _rule("www and a path", f'(?i:www)\\.(?:[^ \t\n"<>|.!?(){{}},]++\\.)+[{A}]{{2,4}}{URL_PATH}', str),
]
# Rules for what begins with a sign.
SIGNS = [
    # apostrophes
    _rule("clitic", f"('(?i:[sdm]))(?:[^{A}]|\\Z)", _straight),  # dog's -> dog | 's
    _rule("longer clitic", f"('(?i:ll|re|ve))[^{A}]", _straight),  # he'd've -> he | 'd | 've
    _rule("typographic clitic", f"(?!'){APOSTROPHE}(?i:[sdm]|ll|re|ve)", _straight),  # ’sup -> 's | up
    _rule("'t is", "('[tT])(?i:is|was)"),  # 'twas -> 't | was
    _rule("'em", f"{APOSTROPHE}(?i:em|till?|cause)|{APOSTROPHE}[nN]{APOSTROPHE}|{APOSTROPHE}[2-9]0[sS]"),  # '90s, 'n'
    _rule("'n", f"({APOSTROPHE}[nN])(?:[{BLANK}]|\\Z)|({APOSTROPHE}[{N}]{{2}})[{BLANK}]"),  # rock 'n roll, '69
    _rule("typographic 'n", f"(?!'){APOSTROPHE}[nN]"),
    # the web
    _rule("tag", TAG, _unbroken),  # <a href="x"> is one token; so is <b and c>
    _rule("entity", "&(?i:amp|lt|gt|nbsp|(?-i:quot|apos));", lambda text: _ENTITIES[text.lower()]),
    _rule("entity as it stands", "&#[0-9]+;|&(?i:quot|apos);", str),
    _rule("entity for a dash", "&(?i:[mn]dash);", lambda _: "--"),
    _rule("hash tag", f"#(?:[{L}{MARK}\xad]|{ACCENTED})+", str),  # #tag1 -> #tag | 1
    _rule("user", f"@[{A}_][{A}_0-9]*"),
    # runs of signs
    _rule("run of signs", rf"\*+|(?:\\\*){{1,3}}|\#+|@+|_+|<<|>>|[!?]+|{SUPERSCRIPT}+|{SUBSCRIPT}+", str),
    _rule("smiley", r"([<>]?[:;=]['*o-]?[()\[\]{|\\@DdPpO])[^A-Za-z0-9]", _brackets),
    _rule("face", r"\((?:[-^x=~<>'][_.]?[-^x=~<>']|[\^x=~<>']-[\^x=~<>'`])\)", _brackets),  # (^-^)
    _rule("written bracket", "-(?i:[lr][rsc]b)-"),
    _rule("long dash", "-----+"),
    _rule("dash", "--+", lambda _: "--"),
    _rule("ellipsis", r"\.{3,5}|\.(?:[ \xa0]\.){2,}", lambda _: "..."),
    _rule("quote", "``|''|[`‘’‛“”«»‹›\x91-\x94]", lambda _: "'"),
    _rule("two quotes", "[`‘’‚‛“”„‟«»‹›\x91-\x94]{2}", _quotes),  # ““ -> ````, which stays
    _rule("dropped character", f"{DROPPED}|[{SPACES}]+", lambda _: ""),
]
# Rules for what begins with either.
EITHER = [
    _rule("word", WORD),  # café
    _rule("sentences without a space", DOTTED),  # man.A
    _rule(  # dog., -> dog. | ,
        "before a comma", f"((?:{WORD}|{COMPOUND}|{DOTTED}|{HYPHENS_BEHIND_DOTS}|{AMPERSANDS})\\.)[,;:、]"
    ),
    _rule("number", f"[-+]?{NUMBER}"),  # 1,000  12:30  -.5
    _rule(  # (800) 555-1212 is one token, and so are 20 30 400000
        "phone",
        f"(?:\\+?[{N}]{{2,4}}[- \xa0](?:[{N}]{{2,4}}[- \xa0])?|\\([{N}]{{2,3}}\\)[ \xa0]?)"
        f"[{N}]{{3,4}}[- \xa0]?[{N}]{{3,5}}",
        lambda text: _brackets(_unbroken(text)),
    ),
    _rule(
        "e-mail",
        f'(?:<|&(?i:lt);)?[{A}0-9][^{BLANK}"<>|(){{}}]{{0,99}}@(?:{ADDRESS}\\.)*{ADDRESS}(?:>|&(?i:gt);)?',
        str,
    ),
    # No character from comma to underscore in its names: no capitals, digits or hyphens.
    _rule("com", f"(?:[^ \t\n\"`'<>|.!?(){{}}$,-_]{{1,63}}+\\.){{1,9}}(?i:com|net|org|edu)(?:{URL_PATH})?", str),
    _rule("eastern smiley", r"[-^x=~<>']_[-^x=~<>']"),  # ^_^
    _rule("any other", "[^ \t\n]", lambda char: _WRITTEN.get(char, char)),
]

# Captions of nothing but words, commas and a final full stop need no rules.
_PLAIN = re.compile(r"[A-Za-z ,]*+\.? *")
_NOT_PLAIN = ABBREVIATIONS | frozenset("abcdefghijklmnopqrstuvwxyz")  # if a full stop follows
_WORDS, _SIGNS = WORDS + EITHER, SIGNS + EITHER
_WORD_START = re.compile(f"[{L}{N}{MARK}\xad]")
_SPACES = re.compile(f"[ \t\n][{SPACES}]*")
_PLAIN_WORD = re.compile(r"([A-Za-z]++) ")


def _plain(caption: str) -> list[str] | None:
    """The tokens of a caption without surprises, else None."""
    if not _PLAIN.fullmatch(caption):
        return None
    tokens = caption.lower().replace(",", " ").split()
    if tokens and tokens[-1][-1] == ".":
        tokens[-1] = tokens[-1][:-1]
        if tokens[-1] in _NOT_PLAIN:
            return None
        if not tokens[-1]:
            tokens.pop()
    return tokens if SPLIT_WORDS.isdisjoint(tokens) else None


def _scan(text: str, shadow: str, at: int, end: int) -> Iterator[str]:
    """The tokens between two places in the text, punctuation included."""
    while at < end:
        if match := _SPACES.match(shadow, at):
            at = match.end()
        elif (match := _PLAIN_WORD.match(shadow, at)) and (word := match[1].lower()) not in SPLIT_WORDS:
            yield word
            at = match.end(1)
        else:
            longest, write, stop = 0, str, at
            for _, pattern, rule_write in _WORDS if _WORD_START.match(shadow, at) else _SIGNS:
                if (match := pattern.match(shadow, at)) and match.end() > longest:
                    longest, write, stop = match.end(), rule_write, match.end(match.lastindex or 0)
            yield write(text[at:stop]).lower()
            at = stop


def tokenize(captions: Sequence[str]) -> list[list[str]]:
    """The tokens of each caption, punctuation dropped: those of the COCO caption toolkit's Java tokenizer.

    The captions are read like the lines of a file. As in the original, a few rules look one word ahead, and that may
    be the first word of the next caption: "vitamin C." gives "c." before "a dog" and "c" before "A dog". Others want
    a character behind their token, if only the end of the line, which the last caption lacks: "they've" gives "they"
    and "'ve", but as the last word of all "they" and "ve". The tokens of a caption by itself are
    `tokenize([caption])[0]`.

    Unlike in the original, a line separator inside a caption is a space and cannot shift the captions that follow, and
    an HTML attribute whose quotation mark a caption leaves open does not go on in the next one. Tokens may have a
    no-break space inside, as in the original ("1 1/2").

    Example:

    ```python
    >>> tokenize(["A man's kitchen, well-lit.", "They aren't (yet)!"])
    [['a', 'man', "'s", 'kitchen', 'well-lit'], ['they', 'are', "n't", '-lrb-', 'yet', '-rrb-']]
    ```
    """
    found: list[list[str] | None] = [_plain(caption) for caption in captions]
    if None not in found:
        return found
    lines = [caption.translate(_SEPARATORS) for caption in captions]
    text = "\n".join(lines)
    shadow = text.translate(_SHADOW)
    start = 0
    for place, line in enumerate(lines):
        end = start + len(line)
        if found[place] is None:
            tokens = list(_scan(text, shadow, start, end))
            tokens[-1:] = [token.rstrip() for token in tokens[-1:]]  # as the toolkit does: an address may end in U+00A0
            found[place] = [token for token in tokens if token not in PUNCTUATION]
        start = end + 1
    return found
