"""Problems and verdicts: load problems, extract an answer, judge it, and turn rewards into group advantages.

    problems = load_problems("gsm8k", "train", count=256)
    r = reward(completion, problems[0].answer)         # 1.0 or 0.0
    advantages = group_advantages(rewards, groups)     # [B]

`python rewards.py "completion or answer" "gold"` shows what is extracted, how each side is read, and the verdict.
"""
from __future__ import annotations

import cmath
import hashlib
import json
import math
import random
import re
import sys
import unicodedata
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # the command line reads problems before it takes the seconds to import torch
    from torch import Tensor


class InputError(ValueError):
    """A mistake in what the user gave. The message is one line that names the value and the way out."""


# ------------------------------------------------------------------------------------------------------------- problems

SHORT_NAMES = {"gsm8k": "openai/gsm8k:main", "math500": "HuggingFaceH4/MATH-500", "aime24": "HuggingFaceH4/aime_2024",
               "aime25": "math-ai/aime25", "polaris": "POLARIS-Project/Polaris-Dataset-53K"}
# In order of preference: a row may hold a worked solution beside its answer.
FIELDS = {"question": ("question", "problem", "prompt", "query", "instruction", "input"),
          "answer": ("answer", "final_answer", "expected_answer", "ground_truth", "target", "solution", "output")}


class Problem(NamedTuple):
    """`question` as it is put to the model; `answer` is the gold text, taken out of `#### n` or \\boxed{}."""
    question: str
    answer: str


def split_of(question: str) -> str:
    """"train" or "test" (about one in four), decided by the text alone: no seed moves a problem across."""
    return "test" if hashlib.sha256(question.strip().encode()).digest()[0] < 64 else "train"


def chain_problems(count: int | None, split: str, operands: int = 4, seed: int = 0) -> list[Problem]:
    """`count` different sums of `operands` two-digit numbers, such as Problem("37+48+25+96=", "206"), by `seed`.
    Raises InputError for an unknown split, for no count, and for more than there is room for."""
    if split not in ("train", "test"):
        raise InputError(f"unknown split {split!r}: use train or test")
    room = 90 ** max(operands, 0) // 8  # half of the test quarter: drawing at random stays quick
    if operands < 1 or count is None or not 1 <= count <= room:
        raise InputError(f"cannot make {count} chains of {operands} operands: give a count, with room for 1 to {room}")
    rng, problems = random.Random(f"chain {split} {operands} {seed}"), {}
    while len(problems) < count:
        numbers = [rng.randint(10, 99) for _ in range(operands)]
        question = "+".join(map(str, numbers)) + "="
        if split_of(question) == split:
            problems[question] = Problem(question, str(sum(numbers)))
    return list(problems.values())


def load_problems(source: str, split: str, count: int | None = None, seed: int = 0, operands: int = 4,
                  question_field: str | None = None, answer_field: str | None = None,
                  divide: bool = True) -> list[Problem]:
    """Problems of `split` ("train", "test", or "all" of a data set).

    source: "chain"; a short name (SHORT_NAMES); a .jsonl or .parquet file; or a hub id, "owner/name[:config]".
    count: None takes all in order (not of "chain"); a number takes a random sample without replacement, by `seed`.
    operands: terms of a sum of "chain". question_field, answer_field: found by name if not given.
    A file, or a data set published in one split (math500, aime24, aime25, polaris), is divided by split_of of the
    question's text, so that train and test never overlap; "all" is the whole, and so is either split without `divide`.
    Raises InputError for what is unknown, missing, broken or too few, and for a gold answer that cannot be read.
    """
    if source == "chain":
        return chain_problems(count, split, operands, seed)
    if split not in ("train", "test", "all"):
        raise InputError(f"unknown split {split!r}: use train, test or all")
    splits = load_splits(source)
    whole = split == "all" or len(splits) == 1
    if not whole and split not in splits:
        raise InputError(f"{source} has no split {split!r}: it has {', '.join(splits)}; --test-data takes another set")
    rows = [row for rows in splits.values() for row in rows] if whole else splits[split]
    problems = [(n, row_problem(row, f"{source}, problem {n}", question_field, answer_field))
                for n, row in enumerate(rows, start=1)]
    if whole and divide and split != "all":
        problems = [(n, problem) for n, problem in problems if split_of(problem.question) == split]
    if not problems or count is not None and not 1 <= count <= len(problems):
        raise InputError(f"cannot take {'any' if count is None else count} problems: "
                         f"the {split} split of {source} has {len(problems)}")
    chosen = problems if count is None else random.Random(seed).sample(problems, count)
    for n, (question, gold) in chosen:
        if not reward(f"\\boxed{{{gold}}}", gold):  # then nothing can hit it
            raise InputError(f"{source}, problem {n}: cannot read the gold answer {gold[-80:]!r} ({question[:60]!r})")
    return [problem for _, problem in chosen]


def load_splits(source: str) -> dict[str, list[dict]]:
    """The splits of a data set, as it is published; a file is one."""
    kind, (path, _, config) = Path(source).suffix[1:].lower(), SHORT_NAMES.get(source, source).partition(":")
    if (there := Path(source).is_file()) != (kind in ("jsonl", "parquet")):
        raise InputError(f"{source} is neither .jsonl nor .parquet" if there else f"no such file: {source}")
    if kind == "jsonl":
        return {"train": read_jsonl(source)}
    if kind != "parquet" and "/" not in path:
        raise InputError(f"unknown data set {source!r}: use chain, {', '.join(SHORT_NAMES)}, a .jsonl or .parquet "
                         "file, or a hub id owner/name")
    from datasets import load_dataset, logging  # slow to import

    logging.set_verbosity(logging.CRITICAL)  # what goes wrong is told once, below
    try:
        return load_dataset(kind, data_files=source) if kind == "parquet" else load_dataset(path, config or None)
    except Exception as error:  # some twenty kinds, for the network, the name, the config, the file
        reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
        raise InputError(f"cannot load the data set {source}: {reason}") from error


def read_jsonl(path: str) -> list[dict]:
    rows = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        try:
            rows += [dict(json.loads(line))] if line.strip() else []
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f'{path}, line {number}: no {{"question": "…", "answer": "…"}}: {error}') from None
    return rows


def row_problem(row: dict, where: str, question_field: str | None, answer_field: str | None) -> Problem:
    """The Problem in a row; `where` names the row in errors."""
    names, values = {name.lower(): name for name in row}, []
    for part, named in (("question", question_field), ("answer", answer_field)):
        field = named or next((names[name] for name in FIELDS[part] if name in names), None)
        if field not in row:
            raise InputError(f"{where}: no field {named or part!r}; it has {', '.join(row)} (name one: --{part}-field)")
        values.append(row[field])
    question, answer = values
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"{where}: the question is no text: {str(question)[:60]!r}")
    if "body" in names and not question_field:
        body = str(row[names["body"]]).strip()
        question = f"{body}{'' if body[-1:] in '.!?,' else ','} {question}"  # SVAMP: a third break off in "if …"
    answer = answer[0] if isinstance(answer, list) and len(answer) == 1 else answer
    answer = int(answer) if isinstance(answer, float) and answer.is_integer() else answer
    if not isinstance(answer, (str, int, float)) or answer != answer:  # NaN is unlike itself
        raise InputError(f"{where}: the answer is no text and no number: {str(answer)[:60]!r}")
    gold = str(answer).rpartition("####")[2].strip()
    return Problem(question, last_box(gold) or gold)


# ----------------------------------------------------------------------------------------------- rewards and advantages

def reward(completion: str, gold: str) -> float:
    """1.0 if the answer in the completion's text is right, else 0.0: also where there is none or it can't be read."""
    return float(is_correct(extract_answer(completion), gold))


def group_advantages(rewards: Tensor, groups: Tensor, kind: str = "std") -> Tensor:
    """Advantage of each completion over the others of its prompt: [B], with the rewards' device and dtype.

    rewards: [B] float. groups: [B] long, equal for completions of the same prompt, in any order.
    kind: "std"   (r − mean) / std, with the population std, divided by G (GRPO, arXiv 2402.03300);
          "mean"  r − mean (Dr. GRPO, arXiv 2503.20783);
          "loo"   r − mean of the others, which is (r − mean)·G/(G − 1) (RLOO, arXiv 2402.14740).
    A group of equal rewards, so also a group of one, gets exactly 0. Raises InputError for an unknown kind.
    """
    if kind not in ("std", "mean", "loo"):
        raise InputError(f"unknown advantage {kind!r}: use std, mean or loo")
    advantages = rewards.new_zeros(rewards.shape)
    for group in groups.unique():
        members = groups == group
        r = rewards[members]
        if (r != r[0]).any():  # asked of the rewards: a computed std may be rounding noise instead of 0
            scale = {"std": 1 / r.std(correction=0), "mean": 1, "loo": len(r) / (len(r) - 1)}[kind]
            advantages[members] = (r - r.mean()) * scale
    return advantages


# ------------------------------------------------ the reader of maths, behind reward: the algorithm needs nothing of it

BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?:\{|([^\s{}$]+))")
STATEMENT = re.compile(r"(?i)\banswer(?: (?:to|of|for) [^.:=\n]{1,60}?)?[\s*]{0,4}(?:is\b|equals\b|:|=)[\s:*=]{0,10}")
REASON = re.compile(r",?\s\(?(?:because|since|which(?! is (?:wrong|incorrect))|where|given|by(?!\s\S*\d)|as\s\w+ed)\b")
SO = re.compile(r"[,;]?\s\(?(?:so(?! far| many| much)|hence|thus|therefore)\b")
ASIDE = re.compile(r"^not\s.*\sbut\s|(?:,|\sand|\sbut)\snot\s.*|\sis (?:the|our|my)\b[a-z ]*\banswer$"
                   r"|^(?:(?:therefore|then|simply|just|exactly|about|approximately|equal to|option),?\s)+")
# Where a formula may begin after a word, and what before it makes it a part of what is said, or not said at all.
START = re.compile(r"(?<=[A-Za-z][a-z,:]\s)(?=[-−+$€£\\(\[{|.√\d]|[A-Za-z](?![a-z])|[A-Z]+\b)")
UNSAID = re.compile(r"(?i)\b(?:not|\w+n't|never|cannot|false|wrong)\b(?!.*\bbut\b)|\b(?:is|are)\b.*\d.*\b(?:is|are)\b"
                    r"|(?:\\[a-z]+|\d\S*\s+(?!is|are)[a-z]+|\b(?:by|in|every|(?:half|third|quarter|factors?) of))\s*$")


def extract_answer(text: str) -> str | None:
    """The answer that a completion states in its last 10,000 characters, as text, or None.

    In this order: the last balanced \\boxed{…} or \\fbox{…} that is not empty; the last `#### …`; the last "the answer
    is …" or "Answer: …"; the formula that ends the last sentence, or its conclusion ("so …"). What is ambiguous:
    - An unclosed box and all after it is ignored, an earlier one counts: `\\boxed{1` may have been on its way to 12.
    - A statement is taken whole, to the end of its sentence or to a reason ("because …"): no part of "5 or 7" is the
      answer. "The largest n is 34" says 34, "not 4 but 5" says 5, and "5!" at the end of a sentence is no factorial.
    """
    text = re.sub(r"\\(?:boxed|fbox)\s*\{\s*\}", "", text[-10_000:])  # 100 kB of anything must cost nothing
    if BOX.search(text):
        return last_box(text)
    if marked := re.findall(r"####\s*([-+−$\\(\[{.\d][^\n]*)", text):  # a heading, "#### Step", is no answer
        return marked[-1].strip()
    said = [statement.end() for statement in STATEMENT.finditer(text)]
    text = text[said[-1]:][:2 * MAX_LENGTH] if said else text.strip()[-2 * MAX_LENGTH:]
    text = re.sub(r"\\\[.*?\\\]|\$\$.*?\$\$", lambda display: " ".join(display[0].split()), text, flags=re.DOTALL)
    sentence = re.split(r"\n|[.!?]\s+(?=[A-Z*#])", text)[0 if said else -1]
    return stated(sentence, bool(said)) if len(sentence) <= MAX_LENGTH else None


def last_box(text: str) -> str | None:
    """Inside of the last whole box that is not empty."""
    for box in reversed(list(BOX.finditer(text))[-20:]):
        depth, rest = 1, text[box.end():box.end() + 2 * MAX_LENGTH]
        braces = re.finditer(r"\\.|[{}]", rest) if not box[1] else ()  # \boxed 7
        end = next((at.start() for at in braces if (depth := depth + {"{": 1, "}": -1}.get(at[0], 0)) == 0), 0)
        if inside := box[1] or rest[:end].strip():
            return inside
    return None


def stated(line: str, said: bool) -> str | None:
    """All of a sentence, or the first of its tails that is a formula after words: "there are 12 apples". After "the
    answer is" (`said`), these words must end in is, are or be."""
    if not said and (step := re.fullmatch(r"(?:.*;)?(?:[\d\s.,+*/()×÷$%−-]+=)+([^=]+?)[\s.]*", line)):
        return step[1].strip()  # 37+48=85;85+25=110
    line = ASIDE.sub("", REASON.split(SO.split(line)[0 if said else -1])[0].rstrip(" *`.!?").lstrip(" *`,"))
    starts = [start.start() for start in START.finditer(line) if line[:start.start()].count("$") % 2 == 0]
    for start in [0, *starts[-12:]]:
        word = line[:start].lower().rstrip(" ,:").rpartition(" ")[2]
        free = word in ("is", "are", "be", "equals") if said else word not in MODIFIERS - {"to"}
        free = start == 0 or free and not UNSAID.search(line[:start])
        if free and read(line[start:]).kind not in ("text", "unreadable"):
            return line[start:]
    return line if line and said else None


# ------------------------------------------------------------------------- reading: from text over tokens to its values

# What is not understood to its last character is text, equal to its own words alone. No text can cost much: limited are
# its characters and tokens, the depth of nesting, the items to match in any order and the size of exact numbers.
MAX_LENGTH, MAX_TOKENS, MAX_DEPTH, MAX_ITEMS = 500, 200, 24, 32  # depth: of brackets, fractions, … in one another


class Node(NamedTuple):
    """What is said: a formula, with its values, or a structure of others, such as "set" or "=", without."""
    kind: str
    parts: tuple
    values: tuple = ()

    def __str__(self) -> str:
        leaf = self.kind in ("name", "number")
        return str(self.parts[0]) if leaf else f"{self.kind}({', '.join(map(str, self.parts))})"


def invert(table: dict[str, str]) -> dict[str, str]:
    return {name: sign for sign, names in table.items() for name in names.split()}


COMMANDS = invert({  # of LaTeX: the many spellings of one sign, and what only changes the looks
    "*": "cdot times", "/": "div", "±": "pm", "∓": "mp", "π": "pi", " infinity": "infty", "°": "circ degree", "=": "in",
    "∪": "cup", "∩": "cap", "≤": "le leq leqslant", "≥": "ge geq geqslant", "≈": "approx", "%": "%",
    "|": "vert lvert rvert mid", r"\{": "lbrace", r"\}": "rbrace", "⟨": "langle", "⟩": "rangle",
    r"\frac": "dfrac tfrac cfrac", r"\binom": "dbinom tbinom", '"ohm': "Omega", " ": ", ! ; : >"}) | {" ": " "}
WORDS = invert({"π": "pi", "infinity": "infinity", "°": "degrees degree", "%": "percent", ",": "or and", "/": "per"})
MULTIPLES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
UNITS = invert({  # without the s of the plural
    "g": "gram", "kg": "kilogram", "oz": "oz ounce", "lb": "pound", "l": "liter", "mi": "mile", "yd": "yard",
    "mm": "millimeter", "cm": "cm centimeter", "m": "meter", "km": "km kilometer", "in": "in inch inche",
    "ft": "ft foot feet", "h": "hour hr", "min": "minute", "s": "second", "dollar": "USD", "mi / h": "mph"})
# After a number, what is no unit counts, as apples do. But these words, there or before, change what the number says.
MODIFIERS = {*MULTIPLES, *(
    "and or as not but nor neither either than less more fewer least most minus plus times over out to from between "
    "unless if when except without half halve halved third quarter fourth fifth sixth seventh eighth ninth tenth "
    "hundredth thousandth millionth billionth quadrillion lakh crore grand score pair couple twice double doubled "
    "tripled squared cubed factorial remainder modulo mod below negative wrong th st nd rd").split()}
GREEK = "alpha beta gamma delta epsilon zeta eta theta lambda mu nu xi rho sigma tau phi chi psi omega ell".split()
CHARACTERS = str.maketrans("−–×·⋅∙∗÷∕⁄º′’", "--*****///°''", "€£₹¥") | {ord("√"): " sqrt ", ord("∞"): " infinity "}
CLOSING, END = {"(": ")]", "[": ")]", "{": "}", r"\{": [r"\}"], "⟨": "⟩", "⟦": "⟧"}, "\n"

REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in [  # of LaTeX into signs and "words
    (r"(?:\\\$|(?<![^-])\$(?=[\d.,]+$))\s*([\d.,\\!]*\d)(?![\d.,\\!]*\s*(?:\w|\\[a-z]))", r" \1 \\text{dollar} "),
    (r"(?<!\\)\\[()\[\]$]|[\x00-\x20\x7f\"$`~]+", " "),  # what stands around maths
    (r"^ ?\*\*([^*]+)\*\*", r"\1 "), (r"^[ *=:≈]+|[ *.,;:]+$", ""),
    (r"(?<=\d)(?:\\!)?(?:,\\!|\{,\}|\\,|_)\s*(?=\d{3}(?!\d))", ""),  # 10,\!080
    (r"(\d[\dA-F]*)_(?:([1-9]\d?)|\{([1-9]\d?)\})(?!\d)", r'\1 "base^\2\3 '),  # 52_8, as if it were a unit
    (r"(?<![\d.])\d{1,3}(?:,\d{3})+(?![^(\[]*[)\]])(?!\d)", lambda number: number[0].replace(",", "")),
    (r"\\(?:text(?:bf|it|rm|sf|normal)?|[mh]box|mathrm|operatorname)\s*\{([^{}]*)\}",
     lambda text: re.sub(r"[\\*]?([A-Za-z]+)", r' "\1', f" {text[1]} ")),
    (r"(?:\b[mM]\s*)?\\(?:angle|triangle|over\w+)\s*(?:\{([A-Z]{1,4})\}|(?=[A-Z]{1,4}\b))", r" \1 "),
    (r"\\begin\s*\{(?:[a-z]*matrix\}|array\}\s*\{[^{}]*\})", "⟦⟨"), ("[&;]", ","),
    (r"(?:\\\\)?\s*\\end\s*\{(?:[a-z]*matrix|array)\}", "⟩⟧"), (r"\\\\", "⟩,⟨"),
    (r"\\(?:left|right|[bB]ig[lr]?|\w*style|limits|q?quad|math[bci]\w+|boldsymbol|vec|bf|rm|boxed|fbox)(?![a-z])", " "),
    (r"\\([A-Za-z]+|[^{}])", lambda command: COMMANDS.get(command[1], command[0]) + " "),
    (r"^(?:≈|(?:Rs\.?|USD?)\s*(?=\d))", ""), (r"(?<=[a-z])\.(?=\s|$|[a-z]\b)", ""),  # sq. ft., a.m.
    (r'(?i)(?<=\d)\s*"?(dozen|hundred|thousand|million|billion|trillion)s?\b', lambda n: f"*{MULTIPLES[n[1].lower()]}"),
    (r"\*\*", "^"), ("<=", "≤"), (">=", "≥"), (r"(?<![\d.])\.(?=\d)", "0."),
    (r"((?:^|[=≈,])(?:[^A-Za-z=≈,]|\\frac|\\sqrt)*[\d}π)]) +([gmshLNJWVKACTF])(?= *(?:[,/^]|$))", r'\1 "\2'),  # no 5m
    (r'"?\b(?:square|sq) ("?[A-Za-z]+)', r"\1^2"), (r'"?\b(?:cubic|cu) ("?[A-Za-z]+)', r"\1^3"),
    (r"\\(frac|binom|sqrt)\s*(\d)", r"\\\1{\2}"), (r"(\\(?:frac|binom)\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),  # \frac43
    (r"(?<![\d.^_])(\d+)\s*(?:\\frac\s*\{(\d+)\}\s*\{(\d+)\}|\s(\d+)/(\d+))",  # 1\frac45 is a sum, 1\frac54 is not
     lambda n: n[0] if int(n[2] or n[4]) >= int(n[3] or n[5]) else f"({n[1]}+{n[2] or n[4]}/{n[3] or n[5]})"),
    (r"\|([^|]+)\|", r"\\abs{\1}"), (r"\^\s*\{\s*([\d°])\s*\}", r"^\1 "), (r"\^\s*°", "°"),
    (r"\b([fgh])\s*\^\s*\{\s*-1\s*\}\s*(?=\()", r"\1_{inverse}"), (r"\\(sin|cos|tan)\s*\^\s*\{\s*-1\s*\}", r"\\arc\1 "),
    (r"°\s*\"?([CF])\"?(?=\s*$)", r' "deg\1'), (r"(?<=\d)\s*\(([A-Za-z][A-Za-z. /]+)\)", r" \1")]]  # 9 (apples)


def clean(text: str) -> str:
    """The text with LaTeX's and Unicode's variants in one spelling, and a quotation mark before the words of \\text."""
    text = re.sub("[⁰¹²³⁴-⁹⁻]+", r"^{\g<0>}", text.translate(CHARACTERS))
    text = unicodedata.normalize("NFKC", re.sub("[¼-¾⅐-⅞]", r" \g<0>", text)).replace("⁄", "/")  # 3½ is 3 1/2
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip()


TOKEN = re.compile(r"""(\d+\.?\d*(?:[eE][+-]?\d{1,3}(?!\d))?)
                       | ("?\\?[A-Za-z]+'*)(?:_(\w|\{[^{}]*\}))? | (\\[{}]|\S)""", re.VERBOSE)


def tokens(text: str) -> list[str]:
    """Strings, each of a kind that its first character tells: a number, a letter, "words, a \\command, or a sign."""
    found = [""]
    for match in TOKEN.finditer(text):
        number, name, low, sign = match.groups(default="")
        bare, low, last = name.strip('"\\'), low.strip("{}"), found[-1]
        if bare in WORDS:
            name, sign = "", WORDS[bare]
        letter, plain = f"{bare}_{low}" if low else bare, bare.lower().removesuffix("s") or "s"
        word, unit = name[:1] == '"' or len(bare) > 1 and name == bare, UNITS.get(bare) or UNITS.get(plain, plain)
        before, after, follows = text[:match.start()], text[match.end():], last[:1] == '"'
        if word and MODIFIERS & {bare.lower(), plain}:
            raise ValueError(f"{bare!r} changes what a number says")
        if follows and (word or sign in ("/", "^") or name and last[-1] == "/" or number and last[-1] == "^"):
            found[-1] += " " + (number or sign or unit)  # km / h, cm ^ 2
        elif not name:
            found.append(number or sign)
        elif "\\" + bare in FUNCTIONS or bare in ("frac", "binom", "sqrt"):
            found += ["\\" + bare, "_", low] if low else ["\\" + bare]
        elif name[0] == "\\":
            found.append(letter if bare.lower().removeprefix("var") in GREEK else name)
        elif (len(bare.rstrip("'")) == 1 and (name == bare or last in ("", "(", "{", ",", "="))
              or re.fullmatch("[A-Z]{2,4}", name) and name not in UNITS):  # AB is a segment
            found.append(letter)
        elif (re.fullmatch("[a-z]{2,3}", name) and list(name) == sorted(set(name)) and name not in UNITS
              and (re.search(r"\d$|[-+*/^=({[}]\s*$", before) or re.match(r"\s*[-+*/^=)}\]]", after))):
            found += [*name[:-1], letter[len(name) - 1:]]  # 2xy, ab+c: products are written in alphabetical order
        else:
            found.append('"' + unit)
    return found[1:]


class Reader:
    """Recursive descent over the tokens of an answer. Raises ValueError for what is no formula to its last token."""

    def __init__(self, found: list[str]):
        if len(found) > MAX_TOKENS:
            raise ValueError("too many signs")
        self.tokens, self.at, self.depth = [*found, *[END] * 4], 0, 0

    def take(self, wanted) -> str:
        """The next token, moving past it, if it is one of those wanted; else ""."""
        token = self.tokens[self.at] if self.tokens[self.at] in wanted else ""
        self.at += bool(token)
        return token

    def items(self, closing, separators: str = ",∪") -> list[Node]:
        """Items between separators, up to the closing token."""
        items = [self.statement()]
        while sign := self.take(separators):
            self.take(",")  # "1, 2, and 3"
            items += [symbol(sign)] * (sign in "|∩") + [self.statement()]
        if not self.take(closing):
            raise ValueError(f"unexpected {self.tokens[self.at]!r}")
        return items

    def statement(self) -> Node:
        """A quantity, or what a chain of them says: "=" of a name and its value or interval, or of two formulas."""
        sides, signs = [self.quantity()], ""
        while sign := self.take("=≈<>≤≥"):
            sides, signs = [*sides, self.quantity()], signs + sign
        named = is_name(sides[0])
        if signs[-1:] == "≈" and rounds(sides[-1], sides[-2]):  # 20000/π ≈ 6366.2 says 20000/π
            sides, signs = sides[:-1], signs[:-1]
        if set(signs) <= set("=≈"):
            if all(same(side, sides[-1]) for side in sides[named:-1]):  # 37+48 = 85 says 85
                return Node("=", (sides[0], sides[-1])) if named and signs else sides[-1]
            if signs == "=":
                return Node("=", (*sides,))
        if set(signs) <= set(">≥"):
            sides, signs, named = sides[::-1], signs[::-1].translate(str.maketrans(">≥", "<≤")), is_name(sides[-1])
        if len(signs) == 1 and named:  # x < 3 is −∞ < x < 3
            sides, signs = [symbol("-infinity"), *sides], "<" + signs
        elif len(signs) == 1:
            sides, signs = [*sides, symbol("infinity")], signs + "<"
        ends = {"<<": "()", "<≤": "(]", "≤<": "[)", "≤≤": "[]"}.get(signs)
        if ends and is_name(sides[1]):
            return Node("=", (sides[1], Node(ends, (sides[0], sides[2]))))
        raise ValueError("a chain of different values, or an inequality that is no interval")

    def quantity(self) -> Node:
        """A formula or ratio, and its unit. A ratio of more than two is as many quotients: 1:2:3 = 2:4:6."""
        parts = [self.sum()]
        while self.take(":"):
            parts.append(self.sum())
        quotients = [formula("/" if parts[2:] else ":", part, parts[-1]) for part in parts[:-1]] or parts
        node = quotients[0] if len(quotients) == 1 else Node("ratio", (*quotients,))
        last, unit = self.tokens[self.at - 1], self.tokens[self.at]
        if unit[:1] != '"':
            return Node("unit", (node, "°")) if last == "°" else node
        self.at += 1
        if last[:1].isalpha() and last != "π":
            raise ValueError(f"{unit[1:]!r} after a letter is no unit")
        return Node("unit", (node, unit[1:]))

    def sum(self) -> Node:
        node = self.product()
        while sign := self.take("+-"):
            node = formula(sign, node, self.product())
        return node

    def product(self) -> Node:
        node = self.power()
        while (sign := self.take("*/")) or self.multiplies():
            node = formula(sign or "*", node, self.power())
        return node

    def multiplies(self) -> bool:
        """Whether the next token begins a factor: 2x, 3(4), 5√2, but no number does: neither 2 3 nor \\frac12 3."""
        token = self.tokens[self.at]
        return token[:1].isalpha() or token in CLOSING or token[:1] == "\\" and token != r"\}"

    def power(self) -> Node:
        """An atom with its signs, !, ° or %, and exponent."""
        minus = self.take("+-") == "-"
        if minus and self.take(("infinity",)):
            return symbol("-infinity")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
        node = self.atom()
        for after in "!°%":
            node = formula(after, node) if self.take(after) else node
        node = formula("^", node, self.power()) if self.take("^") else node
        self.depth -= 1
        if minus and node.kind in ("number", "decimal"):
            return node._replace(parts=(-node.parts[0], node.parts[1]), values=((-node.parts[0], 0.0),) * POINTS)
        return formula("*", number("-1"), node) if minus else node

    def atom(self) -> Node:
        token = self.tokens[self.at]
        self.at += 1
        if token[:1].isdigit():
            return number(token)
        if token[:1].isalpha() or token[:1] == '"' and self.tokens[self.at] in ("=", "≈"):
            # An unknown function, as in f(2), P(A|B) or y(0), and no factor, as in R(R+1) or k(x+1).
            short = re.match(r"(?:[fgh]|[A-Z]+)(?![a-z])", token) or ")" in self.tokens[self.at + 2:self.at + 4]
            alone = any(name == token and after != "(" for name, after in zip(self.tokens, self.tokens[1:]))
            if short and not alone and token not in CONSTANTS and self.take("("):
                return formula("call", symbol(token), *self.items(")", ",∪|∩"))
            return symbol(token)
        if token in CLOSING:
            items, closing = self.items(CLOSING[token]), self.tokens[self.at - 1]
            if token in ("{", r"\{"):
                return unordered(items)
            return items[0] if len(items) == 1 and token + closing in ("()", "[]") else Node(token + closing, (*items,))
        if token in (r"\frac", r"\binom"):
            return formula(token, self.atom(), self.atom())
        if token == r"\sqrt":
            root = formula("/", number("1"), unordered(self.items("]"))) if self.take("[") else number("1/2")
            return formula("^", self.atom(), root)
        if token in FUNCTIONS:
            return self.function(token)
        raise ValueError(f"unexpected {token!r}")

    def function(self, name: str) -> Node:
        base = self.atom() if self.take("_") else None
        exponent = self.atom() if self.take("^") else None
        bracket = self.tokens[self.at] in CLOSING
        argument = self.atom() if bracket else self.power()
        while not bracket and self.multiplies() and self.tokens[self.at] not in FUNCTIONS:
            argument = formula("*", argument, self.power())  # \sin 2x \cos x
        node = formula(name, formula("radians", argument) if argument.kind == "°" else argument)
        node = node if base is None else formula("/", formula(r"\ln", argument), formula(r"\ln", base))
        return node if exponent is None else formula("^", node, exponent)


def number(token: str) -> Node:
    """A number, with what a decimal's last digit is worth."""
    x, places = Fraction(token), len(token.partition(".")[2])
    return Node("decimal" if places else "number", (x, Fraction(1, 10 ** places)), ((x, 0.0),) * POINTS)


def unordered(items: list[Node]) -> Node:
    """One item, or a set: none of sets, nor in several units, as 5 dimes and 3 nickels."""
    if len(items) == 1:
        return items[0]
    units = {item.parts[1] for item in items if item.kind == "unit"}
    if len(items) > MAX_ITEMS or len(units) > 1 or any(item.kind == "set" for item in items):
        raise ValueError("too many items, several units, or a set of sets")
    return Node("set", (*items,))


def is_name(node: Node) -> bool:
    """Whether it may stand before = only to name what follows: x, AB, |AB|, f(x), P(A), (x,y), sin A."""
    if node.kind == "()":
        return all(part.kind == "name" for part in node.parts) and list(node.parts) == sorted(set(node.parts))
    if node.kind in (r"\abs", r"\sin", r"\cos", r"\tan"):
        return bool(re.fullmatch("[A-Z]+|[a-z]{2,}", str(node.parts[0])))  # A, AB or theta, no x
    return node.kind in ("name", "call")


@lru_cache(maxsize=4096)
def read(text: str) -> Node:
    """What an answer says. Its kind is "text" where that is not understood, and "unreadable", equal to nothing, where
    it is too long or unbalanced, or has no letters and a number that is undefined, as 1/0, or too large."""
    if len(text) > MAX_LENGTH:
        return Node("unreadable", (f"longer than {MAX_LENGTH} characters",))
    cleaned, items = clean(text), []
    try:
        for variant in dict.fromkeys(cleaned.translate(str.maketrans("±∓", signs)) for signs in ("+-", "-+")):
            node = unordered(Reader(tokens(variant)).items(END))
            items += [item for item in (node.parts if node.kind == "set" else [node]) if item not in items]
        node = unordered(items)
        if same(node, node):  # not so for what is undefined
            return node
        raise ValueError("undefined")
    except (ValueError, ArithmeticError) as error:
        words = re.findall(r"\\?[A-Za-z]+|\d+|[^\s\".,]", cleaned)
        letters = {word for word in words if word[-1].isalpha()} - {r"\frac", r"\binom", r"\sqrt", r"\abs"}
        if not letters or len(re.findall(r"[(\[{]", cleaned)) != len(re.findall(r"[)\]}]", cleaned)):
            return Node("unreadable", (str(error),))
        text = " ".join(word.lower() if len(word) > 1 else word for word in words)
        return Node("text", (re.sub("^(?:an?|the) ", "", text).strip("{} "),))  # an article says nothing


# ----------------------------------------------------------------------------------------- judging: equality of meaning

def is_correct(prediction: str | None, gold: str) -> bool:
    """Whether an extracted answer (or None) means the same as the gold answer; False if either cannot be read."""
    return same(read(prediction or ""), read(gold))


def same(a: Node, b: Node) -> bool:
    """Whether two nodes mean the same, with the licences of what a question sets and an answer may leave out.

    - A name, x = 5 or f(2) = 5 or (x,y) = (3,4): x = 5 says 5, but not y = 5. Equations may be multiples of each other.
    - A unit: 5 cm says 5, but neither 5 m nor 5 cm². A base is one: 52_8 says 52, and not its value, 42.
    """
    if a.kind == b.kind == "=":
        (x, left), (y, right) = a.parts, b.parts
        if same(x, y):
            return same(left, right)
        a, b = [formula("-", *node.parts) for node in (a, b)]
        constant = lambda node: equal(node, node._replace(values=node.values[-1:] * len(node.values)))
        return constant(formula("/", a, b)) and not constant(a)
    if "=" in (a.kind, b.kind):
        named, other = (a, b) if a.kind == "=" else (b, a)
        return is_name(named.parts[0]) and same(named.parts[1], other)
    if "unit" in (a.kind, b.kind):
        (x, u), (y, v) = [node.parts if node.kind == "unit" else (node, "%" * (node.kind == "%")) for node in (a, b)]
        return (u == v or not u or not v) and same(x, y)
    if a.values and b.values:
        return equal(a, b)
    if a.kind != b.kind or len(a.parts) != len(b.parts) or a.kind in ("text", "unreadable", "infinity"):
        return a == b and a.kind != "unreadable"
    rest = list(b.parts)
    for item in a.parts:
        found = next((other for other in (rest if a.kind == "set" else rest[:1]) if same(item, other)), None)
        if found is None:
            return False
        rest.remove(found)
    return True


def equal(a: Node, b: Node) -> bool:
    """Whether two formulas have the same value everywhere, with the licences of school mathematics.

    - A decimal of six or more significant digits, rounded or cut, equals what is no decimal: 0.333333 = 1/3.
    - p% equals p/100 and also, where p > 1, a bare p ("what percentage …?"). A bare p ≤ 1 is rather a fraction.
    - 3:4 says 3/4. (But 3:10 and 6:20 may be times of a day.)
    - A variable is compared at positive and at complex values near them, where √(ab) = √a√b; but |x − 1| is not x − 1.
    """
    for one, other in ((a, b), (b, a)):
        percent = one.kind == "%" != other.kind and any(x and abs(x[0]) > 1 for x in other.values)
        decimal = one.kind == "decimal" != other.kind and abs(one.parts[0]) >= 10 ** 5 * one.parts[1]
        if percent and same(one.parts[0], other) or decimal and rounds(one, other):
            return True
    if a.kind == b.kind == ":" and all(node.parts[1].parts[0] in range(10, 60) for node in (a, b)):
        return a.parts == b.parts
    pairs = [(*x, *y) for x, y in zip(a.values, b.values) if x and y]
    return len(pairs) >= 3 and all(
        x == y or 0 < x_error + y_error and max(abs(x), abs(y)) < 1e300 and abs(x - y) <= 16 * (x_error + y_error)
        for x, x_error, y, y_error in pairs)


def rounds(shown: Node, exact: Node) -> bool:
    """Whether a decimal, or a whole number, is a real number, rounded or cut."""
    if shown.kind not in ("decimal", "number") or len(set(exact.values)) != 1 or exact.values[0] is None:
        return False
    (digits, last), x = shown.parts, exact.values[0][0]
    off = (Fraction(x.real) - digits) * (1 if digits > 0 else -1) / last
    return -0.5 <= off < 0.999999 and abs(x.imag) <= 1e-12 * abs(x)


# Formulas are equal if they agree at all points at which both have a value that tells something. A value is a pair: the
# number, and a bound of its rounding error, 0 for rational numbers, which must agree exactly.
POINTS, EPSILON, MAX_BITS = 9, 2.0 ** -52, 2 ** 16  # MAX_BITS of a numerator, an eighth of them of a denominator


@lru_cache(maxsize=4096)
def symbol(name: str) -> Node:
    """Infinity, which has no value; a constant; or a variable with values at the points: random but fixed."""
    if name.endswith("infinity"):
        return Node("infinity", (name,))
    if name in CONSTANTS:
        return Node("constant", (name,), ((CONSTANTS[name], 4 * EPSILON),) * POINTS)
    rng = random.Random(name)
    rational = [Fraction(rng.choice(points)) for points in (range(2, 9, 2), range(3, 10, 2), range(10, 41))]
    rational += [Fraction(rng.randrange(33, 64, 2), 2 ** n) for n in (7, 9, 11, 14)]
    turned = [cmath.rect(rng.uniform(0.6, 1.6), rng.uniform(0.2, 0.5) * rng.choice((1, -1))) for _ in range(2)]
    return Node("name", (name,), (*[(x, 0.0) for x in rational], *[(x, 2 * EPSILON) for x in turned]))


def formula(name: str, *parts: Node) -> Node:
    """An operation on formulas, and its values; None where it has none, as with a list within a formula."""
    found = []
    for known in zip(*(part.values for part in parts)):
        try:
            found.append(value(name, known) if all(known) else None)
        except (ValueError, ArithmeticError, KeyError):
            found.append(None)
    return Node(name, parts, tuple(found) or (None,))


@lru_cache(maxsize=4096)
def value(name: str, known: tuple) -> tuple:
    """The number that an operation makes of others, and a bound of its rounding error."""
    xs, operate = [x for x, _ in known], OPERATIONS[name]
    y = operate(*xs)
    if isinstance(y, Fraction):
        if abs(y.numerator) >> MAX_BITS or y.denominator >> MAX_BITS // 8:
            raise OverflowError("too large")
        return y, 0.0
    if not cmath.isfinite(y) or abs(y) < 1e-300 and all(xs) and name in ("*", "/", "^", r"\exp"):
        raise OverflowError("too large or too small")
    total, effects = EPSILON * abs(y), []
    for n, (x, error) in enumerate(known):
        step = max(error, 1e-7 * abs(x)) or 1.0
        slope = 1.0 if name in "+-" else abs(operate(*xs[:n], x + step, *xs[n + 1:]) - y) / step
        total += slope * (error or EPSILON * float(abs(x)))
        effects += [slope * abs(x)] if 16 * error < abs(x) else []
    if (name in "+-" or name in FUNCTIONS) and effects and min(effects) < 2 ** 23 * total:
        raise ValueError("an argument is lost in the rounding, as e^{-200t} beside 1 or 30 in tanh 30")
    return complex(y), total or 1e-300  # not 0, as if it were rational


def power(x: Fraction | complex, y: Fraction | complex) -> Fraction | complex:
    """x^y, exact for an integer exponent; the real root for an odd root of a negative number."""
    exact = isinstance(x, Fraction) and isinstance(y, Fraction)
    bits = max(abs(x.numerator), x.denominator).bit_length() - 1 if exact else 0
    if exact and y.denominator == 1 and bits * abs(y) <= MAX_BITS:
        return x ** int(y)
    if exact and x < 0 and y.denominator % 2:
        return (-1) ** y.numerator * complex(-x) ** complex(y)
    return complex(x) ** complex(y)


CONSTANTS = {"π": math.pi, "e": math.e, "i": 1j}
FUNCTIONS = {"\\" + name: getattr(cmath, name.replace("arc", "a")) for name in (
    "sin", "cos", "tan", "asin", "acos", "atan", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "exp")} | {
    r"\cot": lambda z: 1 / cmath.tan(z), r"\sec": lambda z: 1 / cmath.cos(z), r"\csc": lambda z: 1 / cmath.sin(z),
    r"\abs": abs, r"\ln": cmath.log, r"\log": cmath.log10}  # log without a base: as in school
WHOLE = dict(zip(range(1001), range(1001)))  # finds a Fraction, too
OPERATIONS = FUNCTIONS | dict.fromkeys(("/", ":", r"\frac"), lambda x, y: x / y) | {
    "+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y, "^": power,
    "%": lambda x: x / 100, "°": lambda x: x, "radians": lambda x: x * math.pi / 180,
    "!": lambda n: Fraction(math.factorial(WHOLE[n])),
    r"\binom": lambda n, k: Fraction(math.comb(WHOLE[n], WHOLE[k])),
    # An unknown function: any number, but the same for the same name and arguments.
    "call": lambda *xs: Fraction(random.Random(str([f"{complex(x):.11e}" for x in xs])).randint(-999, 999), 512)}


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print('rewards.py: usage: python rewards.py "completion or answer" "gold answer"', file=sys.stderr)
        sys.exit(2)
    extracted = extract_answer(sys.argv[1])
    print("extracted:", extracted)
    print("read as:", read(extracted or ""))
    print("gold as:", read(sys.argv[2]))
    print("verdict:", "right" if is_correct(extracted, sys.argv[2]) else "wrong")
