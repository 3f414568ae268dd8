"""Tokenizer of the COCO caption toolkit in pure Python.

The toolkit sends captions through the Penn Treebank tokenizer of Stanford CoreNLP 3.4.1, a Java program, with the
options `-preserveLines -lowerCase`. Then it drops punctuation. Published BLEU, ROUGE-L and CIDEr of captions are
computed from these tokens, and `tokenize` returns the same ones.

The rules were found by experiment, from the input and output of the program. No source code of CoreNLP, which is under
the GPL, was read or copied.

How it works:

1. A caption that holds only words, commas and a final full stop is lower-cased and split at spaces.
2. Any other caption is scanned from left to right. At each position, all rules for words or all rules for symbols are
   tried, and the longest match wins. Of two matches of the same length, the earlier rule wins.
3. Some rules match more text than the token, because they depend on the text after it. As in the original, this text
   counts for the length of the match but is not part of the token.
4. The winning rule writes its token in Penn Treebank style: `(` becomes `-lrb-`. The token is then lower-cased.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

# Tokens that the toolkit drops. Its list also has -LRB-, -RRB-, -LCB- and -RCB-, but tokens are already in lower case,
# so brackets stay. "!!" and "?!" are not in the list.
PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", ""])

# ---------------------------------------------------------------------------------------------------------------------
# Characters
#
# Rules match a "shadow" of the text, a string of the same length. In the shadow, each character outside ASCII is
# replaced by a placeholder for its kind, such as LETTER for every letter. Tokens are then cut out of the text itself.
# ---------------------------------------------------------------------------------------------------------------------
LETTER, MARK, DIGIT, SYMBOL, SUPERSCRIPT, SUBSCRIPT, SPACE, DROPPED = "λ\u0301٣§²₂\u2003\0"

# Line separators inside a caption become spaces. The original starts a new line at them and shifts all later captions.
_SEPARATORS = dict.fromkeys(map(ord, "\n\v\f\r\u2028\u2029"), " ")
# Characters outside ASCII that rules name; the shadow keeps them. Others get their kind from the ranges of code points
# below, or from their Unicode category. A character without a kind, such as an emoji, is dropped.
_KEPT = "\xa0\xad¢£¤¼½¾\u2010\u2011\u058a–—―‘’‚‛“”„‟«»‹›…、⁄⅓⅔€₠٫٬\x80\x85\x91\x92\x93\x94\x96\x97"
_RANGES = {
    LETTER: "1885-1886",
    SPACE: "2000-200a 3000",
    SUPERSCRIPT: "b2-b3 b9 2070 2074-2079",
    SUBSCRIPT: "2080-2089",
    SYMBOL: (  # each is a token of its own
        "a1 a5-a9 ac ae-b1 b4 b6-b8 bf d7 f7 37e 387 589 5be 5c0 5c3 5c6 5f3-5f4 600-603 606-60c 614 61b 61e-61f 66a "
        "66d 6d4 700-70d 7f6-7f8 964-965 e3f e4f 1fbd 2016-2017 2020-2023 2030-2038 203b 203e-2042 207a-207e 208a-208e "
        "20a4 2100-2101 2103-2106 2108-2109 2114 2116-2118 211e-2123 2125 2127 2129 212e 213a-213b 2140-2144 214a-214d "
        "214f 2155-215e 2190-2bff 3001-3002 3012 30fb ff01-ff0f ff1a-ff20 ff3b-ff40 ff5b-ff65 ffe0-ffe1 ffe5-ffe6"
    ),
    MARK: (  # can be part of a word although it is not a letter
        "2c2-2c5 2d2-2df 2e5-2eb 2ed 2ef-36f 375 378-379 384-385 3f6 483-487 55a-55f 591-5bd 5bf 5c1-5c2 5c4-5c5 5c7 "
        "615-61a 64b-65e 670 6d6-6e4 6e7-6ed 6fd-6fe 70f 711 730-74c 7a6-7b0 7eb-7f3 900-903 93c 93e-94e 951-955 "
        "962-963 981-983 9bc 9be-9c4 9c7-9c8 9cb-9cd 9d7 9e2-9e3 a01-a03 a3c a3e-a4f a81-a83 abc abe-acf b82 bbe-bc2 "
        "bc6-bc8 bca-bcd c01-c03 c3e-c56 d3e-d44 d46-d48 e31 e34-e3a e47-e4e eb1 eb4-ebc ec8-ecd"
    ),
    DROPPED: (  # letters and digits that are newer than the original
        "37f 528-52f 560 588 5ef 860-89f 8a1 8ad-8c9 978 980 9fc af9 c34 c5a-c5d c80 cdd d04 d54-d5f de6-def e86 e89 "
        "e8c e8e-e93 e98 ea0 ea8-ea9 eac 13f5-13fd 16f1-16f8 170d 171f 1878 191d-191e 19b0-19c0 19c8-19c9 1b4c "
        "1c80-1cbf 1cf2-1cf3 1cfa 2c2f 2c5f 312e-312f 31bb-31bf 4db6-4dbf 9fcd-9fff a698-a69d a78f a794-a79f a7ab-a7f7 "
        "a8fd-a8fe a9e0-a9fe aa7e-aa7f ab30-abbf"
    ),
}


class _Shadow(dict[int, str]):
    """Table for `str.translate` from code points to kinds, which grows as new characters occur."""

    def __init__(self) -> None:
        super().__init__({code: chr(code) if code in (9, 10) or 31 < code < 127 else DROPPED for code in range(128)})
        for kind, ranges in _RANGES.items():
            for part in ranges.split():
                first, _, last = part.partition("-")
                self.update(dict.fromkeys(range(int(first, 16), int(last or first, 16) + 1), kind))
        self.update({ord(char): char for char in _KEPT})

    def __missing__(self, code: int) -> str:
        kind, char = DROPPED, chr(code)
        if code <= 0xFFFF:  # characters beyond the basic plane are dropped
            kind = DIGIT if unicodedata.category(char) == "Nd" else LETTER if char.isalpha() else DROPPED
        self[code] = kind
        return kind


_SHADOW = _Shadow()

# ---------------------------------------------------------------------------------------------------------------------
# Parts of rules
#
# LATIN, ALPHA, NUM, BLANK and SPACES are used inside character classes: f"[{ALPHA}]". The others are whole expressions.
# ---------------------------------------------------------------------------------------------------------------------
LATIN = "A-Za-z"
ALPHA = f"{LATIN}{LETTER}"
NUM = f"0-9{DIGIT}"

# Apostrophes and spaces.
APOSTROPHE = "(?:['’\x92]|&(?i:apos);)"
QUOTE = "(?:['’\x92‘‛\x91`]|&(?i:apos);)"  # what counts as an apostrophe inside a word: d`Artagnan
BLANK = " \t\n\xa0"
SPACES = BLANK + SPACE
GAP = f"[{SPACES}\x85]"  # includes the end of a line, so a rule can read the first word of the next caption

# Words and numbers.
ACCENTED = "&(?i:[aeiou](?:acute|grave|uml));"  # caf&eacute; is one token and stays unchanged
WORD = f"(?:[{ALPHA}{MARK}\xad]|{ACCENTED})(?:[{ALPHA}{MARK}\xad{NUM}]|{ACCENTED})*+"  # \xad is a soft hyphen
NUMBER = f"[{NUM}]*(?:[.,:٫٬\xad]?[{NUM}]+)(?:[.,:٫٬\xad][{NUM}]+)*"
COMPOUND_PART = f"(?:[dolDOL]{QUOTE}[{ALPHA}{NUM}]{{2}}[{ALPHA}{NUM}]*+|[{ALPHA}{NUM}]++)"
COMPOUND = f"{COMPOUND_PART}(?:[-_\u2010\u2011\u058a]{COMPOUND_PART})*+"
DOTTED = f"{WORD}(?:[.!?]{WORD})++"
DOTS_THEN_HYPHENS = f"[{LATIN}0-9][{LATIN}0-9.,\xad]{{0,99}}+(?:-(?:(?:[{LATIN}]\\.){{2,}}|[{LATIN}0-9\xad]++))+"
AMPERSANDS = "[A-Z]++(?:(?:&(?i:amp);|[&+])[A-Z]+)+"

# Markup and addresses.
NAME = "[A-Za-z][A-Za-z0-9_:.-]*+"
ATTRIBUTE = f"""{NAME}(?: *+= *+(?:"[^"\n]*"|'[^'\n]*'))?"""
TAG = f"<{NAME}(?: ++{ATTRIBUTE})* *+(?:/ *+)?>|</{NAME} *+>|<[!?][A-Za-z-][^>\n]{{0,500}}>"
URL_PATH = '/[^ \t\n"<>|()]+[^ \t\n"<>|.!?(){},-]'
DOMAIN = f'[^{BLANK}"<>|(){{}}.]++'


def _one_of(words: str) -> str:
    return "(?:" + "|".join(map(re.escape, words.split())) + ")"


# Abbreviations keep their full stop. Abbreviations of the second list may end a sentence.
TITLES = (
    "adj adm adv alex assoc asst atty ave brig capt cf cie cmdr col comdr cpl dept det dr drs elec ens ft gen gov govs "
    "hon insp invt jos lieut lt maj messrs mlle mme mr mrs ms msgr mt natl pfc ph pres prof profs pvt rep reps rev sen "
    "sens sfc sgt spc st ste supt supts treas vs wm"
)
FINAL_ABBREVIATIONS = (
    "al ala apr ariz assn aug bhd bldg blvd bros calif co colo conn corp cos ct dak dec ed.d esq est etc ext feb "
    "fla fri ga inc ind intl jan jr jul jun kan kans ky ltd mar md mich minn mo mon mont neb nev nov oct okla "
    "penn ph.d plc rd rt sep sept seq sq sr sys tel tenn thu thurs tue tues univ va vt wed wis wisc wyo"
)
STATES = "ark az del ill la mass miss ore pa tex wash"  # only with a capital: "ill." is a word and a full stop
NUMBER_ABBREVIATIONS = "art ca fig figs no nos op pp prop"  # No. 5, but "no."
COMPANIES = "[pP]{1,2}[tT][ey][sS]?"  # Pty., Ptes.
FINAL_ABBREVIATION = f"(?:(?i:{_one_of(FINAL_ABBREVIATIONS)})|(?=[A-Z])(?i:{_one_of(STATES)})|{COMPANIES})\\."
ABBREVIATIONS = frozenset(
    " ".join(
        [TITLES, FINAL_ABBREVIATIONS, STATES, NUMBER_ABBREVIATIONS, "pty ptys pte ptes ppty pptys ppte pptes mfg mtg"]
    ).split()
)
SPLIT_WORDS = frozenset(["cannot", "gonna", "gotta", "wanna", "gimme", "lemme"])
# Before these words, a single letter and its full stop end a sentence: "vitamin C. The".
SENTENCE_STARTERS = (
    "A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Mr. Ms. Now "
    "Once One Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You"
)
SENTENCE_START = "|".join(f"{word[0]}(?i:{re.escape(word[1:])})" for word in SENTENCE_STARTERS.split())
EXTENSIONS = (
    "bat bmp c cgi class cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov pdf php pl png ppt ps py sql tar "
    "txt wav x xml zip"
)

# ---------------------------------------------------------------------------------------------------------------------
# How tokens are written, before they are lower-cased
# ---------------------------------------------------------------------------------------------------------------------
_REPLACEMENTS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_REPLACEMENTS |= {"€": "$", "₠": "$", "¤": "$", "\x80": "$", "£": "#", "¢": "cents"}
_REPLACEMENTS |= {"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "\xad": "-"}
_REPLACEMENTS |= {'"': "''", "–": "--", "—": "--", "―": "--", "\x96": "--", "\x97": "--", "…": "...", "\x85": "..."}
_REPLACEMENTS |= dict.fromkeys("\u2010\u2011\u058a٫٬", "")
_QUOTES = {"‘": "`", "‛": "`", "‹": "`", "\x91": "`", "’": "'", "›": "'", "\x92": "'"}
_QUOTES |= {"“": "``", "«": "``", "\x93": "``", "”": "''", "»": "''", "\x94": "''"}
_TO_PENN_QUOTES = str.maketrans(_QUOTES)
_TO_BRACKETS = str.maketrans({"(": "-lrb-", ")": "-rrb-"})
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&nbsp;": "", "&quot;": "'", "&apos;": "'"}
_AMPERSAND = re.compile("&amp;", re.IGNORECASE)


def _default(text: str) -> str:
    """Drop soft hyphens, and replace the entity of the ampersand."""
    return _AMPERSAND.sub("&", text.replace("\xad", "") or "-")


def _straight_quotes(text: str) -> str:
    """Write the apostrophe of a clitic as in ASCII."""
    return text.replace("\xad", "").replace("&apos;", "'").translate(_TO_PENN_QUOTES)


def _penn_quotes(text: str) -> str:
    """Write typographic quotation marks as in the Penn Treebank."""
    return text.translate(_TO_PENN_QUOTES)


def _brackets(text: str) -> str:
    """Write round brackets as in the Penn Treebank."""
    return text.translate(_TO_BRACKETS)


def _no_break(text: str) -> str:
    """Keep a token with spaces together."""
    return text.replace(" ", "\xa0")


class Rule(NamedTuple):
    """Rule that recognises one kind of token.

    Args:
        name: short description of the tokens.
        pattern: regular expression for the shadow. If it has a group, the token is the text of the group. The text
            after the group counts only for the length of the match.
        write: function from the text of the token to the token.
    """

    name: str
    pattern: re.Pattern[str]
    write: Callable[[str], str]


def _rule(name: str, pattern: str, write: Callable[[str], str] = _default) -> Rule:
    return Rule(name, re.compile(pattern), write)


# Rules for tokens that begin with a letter or a digit. A comment shows a text, or a text and its tokens.
WORDS = [
    # words that are split, and words before a clitic
    _rule("split word", "(?i:(can)not|(gon|wan)na|(got)ta|(gim|lem)me)"),  # gonna -> gon | na
    _rule("before a clitic", f"([{ALPHA}\xad]+){APOSTROPHE}(?i:[sdm]|ll|re|ve)"),  # y's -> y | 's
    _rule("before n't", f"([{LATIN}\xad]*[A-MO-Za-mo-z]\xad*)[nN]{QUOTE}[tT]"),  # didn't -> did | n't
    _rule("n't", f"(?i:n{QUOTE}t)", _straight_quotes),
    # apostrophes inside a word
    _rule("name", f"[A-HJ-XZn]{QUOTE}[{ALPHA}]{{2,}}"),  # O'Brien, D'Angelo, N'Sync
    _rule("between vowels", f"[{ALPHA}]+[aeiouyAEIOUY]{QUOTE}[aeiouA-Z][{ALPHA}]*"),  # Hawai'i, ma'am
    _rule(
        "known word with an apostrophe",
        f"(?i:c'mon|nat'l|e'er|ev'ry|li'l|s'mores|(?:somethin|dunkin|ol|[djl]){APOSTROPHE}"
        f"|cap{APOSTROPHE}n|c{APOSTROPHE}est)",
    ),
    _rule("o'o", f"[oO]{QUOTE}[oO]"),
    _rule("y'all", f"([yY]{APOSTROPHE})[{ALPHA}]"),  # y' | all
    # abbreviations
    _rule("final abbreviation", f"({FINAL_ABBREVIATION})(?:[^{ALPHA}{MARK}{BLANK}]?[^{BLANK}])?"),  # Jr.A -> jr. | a
    _rule("title", f"(?:(?i:{_one_of(TITLES)})|[mM][ft][gG])\\."),  # Mr.
    _rule("abbreviation before a number", f"((?i:{_one_of(NUMBER_ABBREVIATIONS)})\\.){GAP}?[{NUM}]"),  # No. 5
    _rule("acronym", f"(?:[{LATIN}]\\.)+"),  # U.S., a.m., J.
    _rule("final initial", f"([{LATIN}])\\.{GAP}+(?:{SENTENCE_START}|{TAG}){GAP}"),  # vitamin C. The
    # words that signs join
    _rule("compound", COMPOUND),  # black-and-white, jack-o'lantern, under_score
    _rule("hyphens after dots", DOTS_THEN_HYPHENS),  # 1.5-mile
    _rule(  # 24/7, w/o, either/or
        "slash", f"[{LATIN}0-9]++(?:-[{LATIN}]++){{0,2}}(?:\\\\?/[{LATIN}0-9]++(?:-[{LATIN}]++){{0,2}}){{1,2}}"
    ),
    _rule("ampersand", AMPERSANDS),  # AT&T
    _rule("s&ls", "(?i:s&(?:amp;)?ls)"),
    _rule("language", r"[cCfF]#|[cC]\+\+"),
    _rule("currency", r"[A-Z]+\$"),  # US$5 -> us$ | 5
    _rule(  # 001.jpg
        "file name", f"[{ALPHA}{NUM}\xad]++(?:\\.[{ALPHA}{NUM}]+)*\\.(?i:{_one_of(EXTENSIONS)})(?={GAP}|[.,!?])", str
    ),
    _rule("fraction", f"(?:[{NUM}]{{1,4}}[- \xa0])?[{NUM}]{{1,4}}[/⁄][{NUM}]{{1,4}}", _no_break),  # 1 1/2 is one token
    _rule("date", f"[{NUM}]{{1,2}}[-/][{NUM}]{{1,2}}[-/][{NUM}]{{2,4}}"),
    # the web
    _rule("http", r"(?i:https?)://[^ \t\n\"<>|(){}]+[^ \t\n\"<>|.!?(){},-]", str),
    _rule("www", f'(?i:www)\\.(?:[^ \t\n"<>|.!?(){{}},]++\\.)+[{LATIN}]{{2,4}}'),
    _rule("www and a path", f'(?i:www)\\.(?:[^ \t\n"<>|.!?(){{}},]++\\.)+[{LATIN}]{{2,4}}{URL_PATH}', str),
]
# Rules for tokens that begin with a sign.
SIGNS = [
    # apostrophes
    _rule("clitic", f"('(?i:[sdm]))(?:[^{LATIN}]|\\Z)", _straight_quotes),  # dog's -> dog | 's
    _rule("longer clitic", f"('(?i:ll|re|ve))[^{LATIN}]", _straight_quotes),  # he'd've -> he | 'd | 've
    _rule("typographic clitic", f"(?!'){APOSTROPHE}(?i:[sdm]|ll|re|ve)", _straight_quotes),  # ’sup -> 's | up
    _rule("'t is", "('[tT])(?i:is|was)"),  # 'twas -> 't | was
    _rule("'em", f"{APOSTROPHE}(?i:em|till?|cause)|{APOSTROPHE}[nN]{APOSTROPHE}|{APOSTROPHE}[2-9]0[sS]"),  # '90s, 'n'
    _rule("'n", f"({APOSTROPHE}[nN])(?:[{BLANK}]|\\Z)|({APOSTROPHE}[{NUM}]{{2}})[{BLANK}]"),  # rock 'n roll, '69
    _rule("typographic 'n", f"(?!'){APOSTROPHE}[nN]"),
    # the web
    _rule("tag", TAG, _no_break),  # <a href="x"> is one token, and so is <b and c>
    _rule("entity", "&(?i:amp|lt|gt|nbsp|(?-i:quot|apos));", lambda text: _ENTITIES[text.lower()]),
    _rule("entity that stays", "&#[0-9]+;|&(?i:quot|apos);", str),
    _rule("entity for a dash", "&(?i:[mn]dash);", lambda _: "--"),
    _rule("hash tag", f"#(?:[{ALPHA}{MARK}\xad]|{ACCENTED})+", str),  # #tag1 -> #tag | 1
    _rule("user", f"@[{LATIN}_][{LATIN}_0-9]*"),
    # runs of signs
    _rule("run of signs", rf"\*+|(?:\\\*){{1,3}}|\#+|@+|_+|<<|>>|[!?]+|{SUPERSCRIPT}+|{SUBSCRIPT}+", str),
    _rule("smiley", r"([<>]?[:;=]['*o-]?[()\[\]{|\\@DdPpO])[^A-Za-z0-9]", _brackets),
    _rule("face", r"\((?:[-^x=~<>'][_.]?[-^x=~<>']|[\^x=~<>']-[\^x=~<>'`])\)", _brackets),  # (^-^)
    _rule("written bracket", "-(?i:[lr][rsc]b)-"),
    _rule("long dash", "-----+"),
    _rule("dash", "--+", lambda _: "--"),
    _rule("ellipsis", r"\.{3,5}|\.(?:[ \xa0]\.){2,}", lambda _: "..."),
    _rule("quote", "``|''|[`‘’‛“”«»‹›\x91-\x94]", lambda _: "'"),
    _rule("two quotes", "[`‘’‚‛“”„‟«»‹›\x91-\x94]{2}", _penn_quotes),  # ““ -> ````, which is not dropped
    _rule("dropped character", f"{DROPPED}|[{SPACES}]+", lambda _: ""),
]
# Rules for tokens that begin with any character. They are tried last.
EITHER = [
    _rule("word", WORD),  # café
    _rule("sentences without a space", DOTTED),  # man.A
    _rule(  # dog., -> dog. | ,
        "before a comma", f"((?:{WORD}|{COMPOUND}|{DOTTED}|{DOTS_THEN_HYPHENS}|{AMPERSANDS})\\.)[,;:、]"
    ),
    _rule("number", f"[-+]?{NUMBER}"),  # 1,000  12:30  -.5
    _rule(  # (800) 555-1212 is one token, and so are 20 30 400000
        "phone",
        f"(?:\\+?[{NUM}]{{2,4}}[- \xa0](?:[{NUM}]{{2,4}}[- \xa0])?|\\([{NUM}]{{2,3}}\\)[ \xa0]?)"
        f"[{NUM}]{{3,4}}[- \xa0]?[{NUM}]{{3,5}}",
        lambda text: _brackets(_no_break(text)),
    ),
    _rule(
        "e-mail",
        f'(?:<|&(?i:lt);)?[{LATIN}0-9][^{BLANK}"<>|(){{}}]{{0,99}}@(?:{DOMAIN}\\.)*{DOMAIN}(?:>|&(?i:gt);)?',
        str,
    ),
    # The character class excludes everything from comma to underscore, which includes capitals, digits and hyphens.
    _rule("com", f"(?:[^ \t\n\"`'<>|.!?(){{}}$,-_]{{1,63}}+\\.){{1,9}}(?i:com|net|org|edu)(?:{URL_PATH})?", str),
    _rule("eastern smiley", r"[-^x=~<>']_[-^x=~<>']"),  # ^_^
    _rule("any other", "[^ \t\n]", lambda char: _REPLACEMENTS.get(char, char)),
]

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizing
# ---------------------------------------------------------------------------------------------------------------------
_PLAIN_CAPTION = re.compile(r"[A-Za-z ,]*+\.? *")  # needs no rules
_KEEP_FULL_STOP = ABBREVIATIONS | frozenset("abcdefghijklmnopqrstuvwxyz")
_WORDS, _SIGNS = WORDS + EITHER, SIGNS + EITHER
_WORD_START = re.compile(f"[{ALPHA}{NUM}{MARK}\xad]")
_SPACES = re.compile(f"[ \t\n][{SPACES}]*")
_PLAIN_WORD = re.compile(r"([A-Za-z]++) ")


def _tokenize_plain(caption: str) -> list[str] | None:
    """Return the tokens of a caption that needs no rules, or None for any other caption."""
    if not _PLAIN_CAPTION.fullmatch(caption):
        return None
    tokens = caption.lower().replace(",", " ").split()
    if tokens and tokens[-1][-1] == ".":
        tokens[-1] = tokens[-1][:-1]
        if tokens[-1] in _KEEP_FULL_STOP:
            return None
        if not tokens[-1]:
            tokens.pop()
    return tokens if SPLIT_WORDS.isdisjoint(tokens) else None


def _scan(text: str, shadow: str, position: int, end: int) -> Iterator[str]:
    """Yield the tokens of a part of the text, punctuation included.

    Args:
        text: all captions, one on each line.
        shadow: the text with placeholders for characters outside ASCII.
        position: start of the part.
        end: end of the part. Rules may read further, but no token begins after it.
    """
    while position < end:
        if match := _SPACES.match(shadow, position):
            position = match.end()
        elif (match := _PLAIN_WORD.match(shadow, position)) and (word := match[1].lower()) not in SPLIT_WORDS:
            yield word
            position = match.end(1)
        else:
            longest, token_end = 0, position
            write: Callable[[str], str] = str
            for _, pattern, rule_write in _WORDS if _WORD_START.match(shadow, position) else _SIGNS:
                if (match := pattern.match(shadow, position)) and match.end() > longest:
                    longest, token_end, write = match.end(), match.end(match.lastindex or 0), rule_write
            yield write(text[position:token_end]).lower()
            position = token_end


def tokenize(captions: Sequence[str]) -> list[list[str]]:
    """Return the tokens of each caption, as the COCO caption toolkit's Java tokenizer does, without punctuation.

    The captions are read like the lines of one file. As in the original, a few rules read one word ahead, which may be
    the first word of the next caption. "vitamin C." gives "c." before "a dog" and "c" before "A dog". Other rules need
    a character after their token. A line end is enough, but the last line has no line end. "they've" gives "they" and
    "'ve", but as the very last word "they" and "ve". To tokenise a single caption, call `tokenize([caption])[0]`.

    Two differences from the original keep a caption from changing the next one. A line separator inside a caption is a
    space. The value of an HTML attribute ends with its caption, even if its quotation mark is not closed.

    Args:
        captions: the captions.

    Returns:
        A list of lower-case tokens for each caption. As in the original, a token may hold a no-break space ("1 1/2").

    Example:

    ```python
    >>> from qformer_captioner.metrics import tokenize
    >>> tokenize(["A man's kitchen, well-lit.", "They aren't (yet)!"])
    [['a', 'man', "'s", 'kitchen', 'well-lit'], ['they', 'are', "n't", '-lrb-', 'yet', '-rrb-']]
    ```
    """
    plain = [_tokenize_plain(caption) for caption in captions]
    if None not in plain:
        return [tokens for tokens in plain if tokens is not None]
    lines = [caption.translate(_SEPARATORS) for caption in captions]
    text = "\n".join(lines)
    shadow = text.translate(_SHADOW)
    all_tokens = []
    start = 0
    for line, tokens in zip(lines, plain, strict=True):
        end = start + len(line)
        if tokens is None:
            tokens = list(_scan(text, shadow, start, end))
            tokens[-1:] = [token.rstrip() for token in tokens[-1:]]  # as the toolkit does: an address may end in U+00A0
            tokens = [token for token in tokens if token not in PUNCTUATION]
        all_tokens.append(tokens)
        start = end + 1
    return all_tokens
