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
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line reads problems before it takes the seconds to import torch
    from torch import Tensor


class InputError(ValueError):
    """A mistake in what the user gave. The message is one line that names the value and the way out."""


# ------------------------------------------------------------------------------------------------------------- problems

# Short name -> (hub path, config, {our split: the publisher's split}).
SHORT_NAMES = {
    "gsm8k": ("openai/gsm8k", "main", {"train": "train", "test": "test"}),
    "math500": ("HuggingFaceH4/MATH-500", None, {"train": "test", "test": "test"}),
    "aime24": ("HuggingFaceH4/aime_2024", None, {"train": "train", "test": "train"}),
    "aime25": ("math-ai/aime25", None, {"train": "test", "test": "test"}),
    "polaris": ("POLARIS-Project/Polaris-Dataset-53K", None, {"train": "train", "test": "train"}),
}
# In order of preference: a row may hold a worked solution beside its answer.
FIELDS = {"question": ("question", "problem", "prompt", "query", "instruction", "input"),
          "answer": ("answer", "final_answer", "expected_answer", "ground_truth", "target", "solution", "output")}


@dataclass(frozen=True)
class Problem:
    """`question` as it is put to the model; `answer` is the gold text, taken out of `#### n` or \\boxed{}."""
    question: str
    answer: str


def chain_split(question: str) -> str:
    """"train" or "test" (about one in four), decided by the text alone: no seed moves a problem across."""
    return "test" if hashlib.sha256(question.strip().encode()).digest()[0] < 64 else "train"


def chain_problems(count: int, split: str, operands: int = 4, seed: int = 0) -> list[Problem]:
    """`count` different sums of `operands` two-digit numbers, such as Problem("37+48+25+96=", "206").

    The same arguments give the same list. Raises InputError for an unknown split and for more than there is room for.
    """
    if split not in ("train", "test"):
        raise InputError(f"unknown split {split!r}: use train or test")
    room = 90 ** max(operands, 0) // 8  # half of the test quarter: drawing at random stays quick
    if operands < 1 or not 1 <= count <= room:
        raise InputError(f"cannot make {count} chains of {operands} operands: there is room for 1 to {room}")
    rng = random.Random(f"chain {split} {operands} {seed}")
    problems = {}
    while len(problems) < count:
        numbers = [rng.randint(10, 99) for _ in range(operands)]
        question = "+".join(map(str, numbers)) + "="
        if chain_split(question) == split:
            problems[question] = Problem(question, str(sum(numbers)))
    return list(problems.values())


def load_problems(source: str, split: str, count: int | None = None, seed: int = 0, operands: int = 4,
                  question_field: str | None = None, answer_field: str | None = None,
                  divide: bool = True) -> list[Problem]:
    """Problems of `split` ("train", "test", or "all" of a data set): a list of Problem.

    source: "chain"; a short name (SHORT_NAMES); a .jsonl or .parquet file; or a hub id, "owner/name[:config]".
    count: None takes all in order (not of "chain"); a number takes a random sample without replacement, by `seed`.
    operands: terms of a sum, for "chain" only.
    question_field, answer_field: found by name if not given (SVAMP's Body and Question are joined).

    A file, or a data set published in one split (math500, aime24, aime25, polaris), is divided by chain_split of the
    question's text, so that train and test never overlap; "all" is the whole, and so is either split without `divide`.
    Raises InputError for what is unknown, missing, broken or too few, and for a gold answer that cannot be read.
    """
    if source == "chain":
        if count is None:
            raise InputError("the chain problems have no end: give a count")
        return chain_problems(count, split, operands, seed)
    if split not in ("train", "test", "all"):
        raise InputError(f"unknown split {split!r}: use train, test or all")
    rows, divided = load_rows(source, split)
    problems = {}
    for n, row in enumerate(rows, start=1):
        problem = row_problem(row, f"{source}, problem {n}", question_field, answer_field)
        if divided or not divide or split in ("all", chain_split(problem.question)):
            problems[n] = problem
    if not problems or count is not None and not 1 <= count <= len(problems):
        raise InputError(f"cannot take {'any' if count is None else count} problems: "
                         f"the {split} split of {source} has {len(problems)}")
    chosen = list(problems) if count is None else random.Random(seed).sample(list(problems), count)
    for n in chosen:
        question, gold = problems[n].question, problems[n].answer
        if not reward(f"\\boxed{{{gold}}}", gold):  # then nothing can hit it
            raise InputError(f"{source}, problem {n}: cannot read the gold answer {gold[-80:]!r} ({question[:60]!r})")
    return [problems[n] for n in chosen]


def load_rows(source: str, split: str) -> tuple[list[dict], bool]:
    """The rows (dicts) of the split, True; but all rows, False, if the source has a single split, yet to be divided."""
    if source.endswith((".jsonl", ".parquet")) and not Path(source).is_file():
        raise InputError(f"no such file: {source}")
    if source.endswith(".jsonl"):
        splits, names = {"all": read_jsonl(source)}, {}
    elif source.endswith(".parquet") or source in SHORT_NAMES or "/" in source:
        from datasets import load_dataset, logging  # slow to import

        logging.set_verbosity(logging.CRITICAL)  # what goes wrong is told once, below
        path, config, names = SHORT_NAMES.get(source, (*source.partition(":")[::2], {}))
        try:
            splits = (load_dataset("parquet", data_files=source) if source.endswith(".parquet")
                      else load_dataset(path, config or None))
        except Exception as error:  # some twenty kinds, for the network, the name, the config, the file
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise InputError(f"cannot load the data set {source}: {reason}") from error
    else:
        raise InputError(f"unknown data set {source!r}: use chain, {', '.join(SHORT_NAMES)}, a .jsonl or .parquet "
                         "file, or a hub id owner/name")
    if not any(map(len, splits.values())):
        raise InputError(f"{source} is empty: it needs at least one problem")
    if split == "all" or len(splits) == 1:
        return [row for rows in splits.values() for row in rows], False
    name = names.get(split, split)
    if name not in splits:
        raise InputError(f"{source} has no split {name!r}: it has {', '.join(splits)}")
    return list(splits[name]), True


def read_jsonl(path: str) -> list[dict]:
    rows = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not JSON ({error})") from None
        if rows and not isinstance(rows[-1], dict):
            raise InputError(f'{path}, line {number}: not a problem, such as {{"question": "…", "answer": "…"}}')
    return rows


def row_problem(row: dict, where: str, question_field: str | None, answer_field: str | None) -> Problem:
    """The Problem in a row; `where` names the row in errors."""
    names = {name.lower(): name for name in row}
    values = []
    for part, named in (("question", question_field), ("answer", answer_field)):
        found = [named] if named else [names[name] for name in FIELDS[part] if name in names]
        if not found or found[0] not in row:
            raise InputError(f"{where}: no field {named or part!r}; it has {', '.join(row)} (name one: {part}_field)")
        values.append(row[found[0]])
    question, answer = values
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"{where}: the question is no text: {str(question)[:60]!r}")
    if "body" in names and not question_field:
        body = str(row[names["body"]]).strip()
        question = f"{body}{'' if body[-1:] in '.!?,' else ','} {question}"  # a third of them break off in "if …"
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if not isinstance(answer, (str, int, float)) or answer != answer:  # NaN is unlike itself
        raise InputError(f"{where}: the answer is no text and no number: {str(answer)[:60]!r}")
    gold = str(answer)
    return Problem(question, gold.rpartition("####")[2].strip() if "####" in gold else last_box(gold) or gold.strip())


# ----------------------------------------------------------------------------------------------- rewards and advantages

def reward(completion: str, gold: str) -> float:
    """1.0 if the answer in the completion's text is right, else 0.0: also where there is none or it can't be read."""
    return float(is_correct(extract_answer(completion), gold))


def group_advantages(rewards: Tensor, groups: Tensor, kind: str = "std") -> Tensor:
    """Advantage of each completion over the others of its prompt: [B], with the rewards' device and dtype.

    rewards: [B] float. groups: [B] long, equal for completions of the same prompt, in any order.
    kind: "std"   (r − mean) / std, with the population std (divided by G) (GRPO, arXiv 2402.03300);
          "mean"  r − mean (Dr. GRPO, arXiv 2503.20783);
          "loo"   r − mean of the others, which is (r − mean)·G/(G − 1) (RLOO, arXiv 2402.14740).
    A group of equal rewards, so also a group of one, gets exactly 0. Raises InputError for an unknown kind.
    """
    import torch

    if kind not in ("std", "mean", "loo"):
        raise InputError(f"unknown advantage {kind!r}: use std, mean or loo")
    group = torch.unique(groups, return_inverse=True)[1]
    r = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    zeros = r.new_zeros(int(group.max()) + 1 if len(group) else 0)
    size = zeros.index_add(0, group, torch.ones_like(r))
    centred = r - (zeros.index_add(0, group, r) / size)[group]
    low, high = (zeros.scatter_reduce(0, group, r, how, include_self=False) for how in ("amin", "amax"))
    equal = (low == high)[group]  # asked of the rewards: a computed std may be rounding noise instead of 0
    if kind == "std":
        centred = centred / (zeros.index_add(0, group, centred ** 2) / size).sqrt()[group]
    elif kind == "loo":
        centred = centred * (size / (size - 1))[group]
    return torch.where(equal, 0.0, centred).to(rewards.dtype)


# ---------------------------------------------------------------------------------------------------------------------
#
# The reader of maths. The algorithm needs nothing below: only `extract_answer` and `is_correct`, which `reward` calls.

# -------------------------------------------------------------- extracting: from a completion to the text of its answer

BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?:\{|([^\s{}$]+))")
STATEMENT = re.compile(
    r"\banswer(?:\s(?:to|of|for)\s[^.:=\n]{1,60}?)?\s{0,3}\**\s?(?:is\b|equals\b|:|=)[\s:*=]{0,10}", re.IGNORECASE)
SENTENCE_END = re.compile(  # or a reason
    r"[.!?](?=[\s*`]*$|\s+[A-Z*#])|(?<![A-Za-z])[.!?](?=\s+[$\\])|,?\s\(?(?:because|since|so|which|where|due|hence|thus"
    r"|therefore|given|assuming|by(?!\s\S*\d)|as\s(?:required|desired|needed|claimed|expected|computed|shown))\b")
ASIDE = re.compile(
    r"^not\s.*\sbut\s|(?:,|\sand|\sbut)\snot\s.*|\s(?:rather than|instead of)\s.*|\sis (?:the|our|my)\b[a-z ]*\banswer$"
    r"|^(?:(?:therefore|thus|then|simply|just|exactly|about|approximately|equal to|given by|choice|option),?\s)+")
# Where a formula may begin after a word.
START = re.compile(r"(?<=[A-Za-z][a-z,:]\s)(?=[-−+$€£\\(\[{|.√\d]|[A-Za-z](?![a-z])|[A-Z]+\b)")
UNSAID = re.compile(  # what makes the formula after it a part of what is said, or not said at all
    r"\b(?:not|\w+n't|never|cannot|false|wrong)\b(?!.*\bbut\b)|\b(?:is|are)\b.*\d.*\b(?:is|are)\b|\\[a-z]+\s*$"
    r"|(?:half|third|quarter)\s+of\s*$|\d\S*\s+(?!is|are|equals|gives|makes)[a-z]+\s*$|\b(?:by|in)\s*$", re.IGNORECASE)


def extract_answer(text: str) -> str | None:
    """The answer that a completion states in its last 10,000 characters, as text, or None.

    In this order: the last balanced \\boxed{…} or \\fbox{…}; the last `#### …`; the last "the answer is …" or
    "Answer: …"; the formula that ends the last line. Where a text is ambiguous:
    - The last box counts, whatever follows it, and however many there are: models correct themselves, and as only one
      is judged, nothing is gained by boxing several guesses.
    - An unclosed box and all after it is ignored, an earlier one counts: `\\boxed{1` may have been on its way to 12.
    - An empty box is no box: prompts, and completions that repeat them, contain `\\boxed{}`.
    - A statement is taken whole, to the end of its sentence or to a reason ("because …"): no part of "5 or 7" is the
      answer. "The largest n is 34" says 34, "not 4 but 5" says 5, and "5!" at the end of a sentence is no factorial.
    """
    text = text[-10_000:]  # 100 kB of anything must cost nothing
    box = last_box(text)
    if box is not None:
        return box or None
    marked = re.findall(r"####\s*([-+−$\\(\[{.\d][^\n]*)", text)  # a heading, "#### Step", is no answer
    if marked:
        return marked[-1].strip()
    said = [statement.end() for statement in STATEMENT.finditer(text)]
    text = text[said[-1]:][:MAX_LENGTH] if said else text.strip()[-MAX_LENGTH:]
    text = re.sub(r"\\\[.*?\\\]|\$\$.*?\$\$", lambda display: " ".join(display[0].split()), text, flags=re.DOTALL)
    return stated(text.split("\n")[0 if said else -1], bool(said))


def last_box(text: str) -> str | None:
    """Inside of the last whole box, "" if there is none but an unclosed one, None without either."""
    unclosed = None
    for box in reversed(list(BOX.finditer(text))[-20:]):
        depth, rest = 1, text[box.end():box.end() + 2 * MAX_LENGTH]
        braces = re.finditer(r"\\.|[{}]", rest) if not box[1] else ()  # \boxed 7
        end = next((at for at in braces if (depth := depth + {"{": 1, "}": -1}.get(at[0], 0)) == 0), None)
        inside = box[1] or end and rest[:end.start()].strip()
        if inside:
            return inside
        unclosed = unclosed if end else ""
    return unclosed


def stated(line: str, said: bool) -> str | None:
    """All of a line, or the first of its tails that is a formula after words: "there are 12 apples". After "the answer
    is" (`said`), these words must end in is, are or be."""
    step = re.fullmatch(r"(?:.*;)?(?:[\d\s.,+*/()×÷$%−-]+=)+([^=]+?)[\s.]*", line)  # 37+48=85;85+25=110
    if step and not said:
        return step[1].strip()
    words, line = line.strip(" *`."), ASIDE.sub("", SENTENCE_END.split(line)[0].rstrip(" *`.!?").lstrip(" *`"))
    starts = [start.start() for start in START.finditer(line) if line[:start.start()].count("$") % 2 == 0]
    for start in [0, *starts[-12:]]:
        word = line[:start].lower().rstrip(" ,:").rpartition(" ")[2]
        free = word in ("is", "are", "be", "equals") if said else word not in MODIFIERS.keys() - {"to", "of"}
        try:
            if (start == 0 or free and not UNSAID.search(line[:start])) and operation(read(line[start:])) != "text":
                return line[start:]
        except InputError:
            continue
    return line if line and said else words if words.isalpha() else None


# ----------------------------------------------------------------------------- reading: from text to an expression tree

# A tree is a Fraction, the name of a symbol, or a tuple (operation, *arguments). What is not understood to its last
# character is ("text", …), equal to its own words alone. No text can cost much: its length, the depth of nesting, the
# items to match in any order and the size of exact numbers are limited.

Tree = Fraction | str | tuple
MAX_LENGTH, MAX_DEPTH, MAX_ITEMS = 500, 24, 32  # characters; brackets, fractions, … in one another; items of a set


def invert(table: dict[str, str]) -> dict[str, str]:
    return {name: sign for sign, names in table.items() for name in names.split()}


COMMANDS = invert({  # of LaTeX: the many spellings of one sign, and what only changes the looks
    "*": "cdot times ast", "/": "div", ":": "colon", "±": "pm", "∓": "mp", "π": "pi", "∞": "infty", "°": "circ degree",
    "∪": "cup", "∩": "cap", "∈": "in", "≤": "le leq leqslant", "≥": "ge geq geqslant", "<": "lt", ">": "gt",
    "≈": "approx", "%": "%", "|": "vert lvert rvert mid", r"\{": "lbrace", r"\}": "rbrace", "⟨": "langle",
    "⟩": "rangle", "'": "prime", r"\frac": "dfrac tfrac cfrac", r"\binom": "dbinom tbinom",
    " ": "left right big Big bigl bigr Bigl Bigr displaystyle textstyle limits quad qquad mathbb mathbf mathcal mathit "
         "boldsymbol vec bf rm boxed fbox , ! ; : > # ( ) [ ]"}) | {" ": " "}
WORDS = invert({"π": "pi", "∞": "infinity inf", "°": "degrees degree", "%": "percent", ",": "or and", "∪": "union",
                r"\sqrt": "sqrt", r"\arcsin": "asin", r"\arccos": "acos", r"\arctan": "atan"})
MULTIPLES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
UNITS = invert({  # without the s of the plural
    "cm": "cm centimeter centimetre", "mm": "mm millimeter", "m": "m meter metre", "km": "km kilometer kilometre",
    "in": "in inch inche", "ft": "ft foot feet", "yd": "yd yard", "mi": "mi mile", "g": "g gram", "kg": "kg kilogram",
    "mg": "mg", "lb": "lb pound", "oz": "oz ounce", "L": "L liter litre", "mL": "mL ml milliliter", "h": "h hour hr",
    "min": "min minute", "s": "s second sec", "Hz": "Hz hertz", "dollar": "dollar USD", "mi/h": "mph", "/": "/ per"})
UNITS |= dict(zip("NJWVKACTF", "NJWVKACTF"))
# After a number, what is no unit counts, as apples do. But these words, there or before, change what the number says.
MODIFIERS = invert({"":
    "and or as not but nor neither either than less more fewer least most minus plus times over out to from between "
    "unless if when except without half halves third thirds quarter quarters fourths fifths sixths eighths tenths "
    "tenth hundredths thousandths hundreds thousands millions billions score pair pairs couple twice double doubled "
    "squared cubed factorial remainder modulo mod below negative zero one two three four five six seven eight nine "
    "ten maybe perhaps possibly wrong incorrect false until through th st nd rd"})
GREEK = invert({"": "alpha beta gamma delta epsilon varepsilon zeta eta theta lambda mu nu xi rho sigma tau phi varphi "
                    "chi psi omega ell Gamma Delta Theta Lambda Sigma Phi Psi Omega"})
CHARACTERS = str.maketrans("−–×·⋅∙∗÷∕⁄º′’", "--*****///°''", "€£₹¥") | {ord("√"): " sqrt "}
FUNCTIONS = {"\\" + name: getattr(cmath, name) for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh", "exp")} | {
    r"\cot": lambda z: 1 / cmath.tan(z), r"\sec": lambda z: 1 / cmath.cos(z), r"\csc": lambda z: 1 / cmath.sin(z),
    r"\arcsin": cmath.asin, r"\arccos": cmath.acos, r"\arctan": cmath.atan, r"\abs": abs,
    r"\ln": cmath.log, r"\log": cmath.log10}  # log without a base: as in school
CLOSING = {"(": (")", "]"), "[": (")", "]"), "{": ("}",), r"\{": (r"\}",), "⟨": ("⟩",), "⟦": ("⟧",)}
LETTER_UNIT = re.compile(r"(?:^|[=≈,])(?:[^A-Za-z=≈,]|\\frac|\\sqrt)*[\d}π)] +$")  # 5 m, but not 5m or 5x m
TOKEN = re.compile(r"""(\d[\dA-F]*_(?:\d+|\{\d+\})|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?) | ("[^"]*)"
                       | (\\?[A-Za-z]+'*)(?:_(\w|\{[^{}]*\}))? | (\*\*|<=|>=|\\[{}]|\S)""", re.VERBOSE)


def quote(command: re.Match) -> str:
    words = command[1].strip().replace("\\", "")
    symbol = command[0].startswith(r"\mathrm") and len(words) == 1 and words not in UNITS
    known = words in WORDS or words in MULTIPLES or "\\" + words in FUNCTIONS
    return f" {words} " if symbol or known or re.search(r"\d|^$", words) else f' "{words}" '  # {5 or 7} is no 5


REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in [  # of LaTeX into signs and "words"
    (r"^(?:[\s$]|\\[(\[])*?(-?)\s*(?:\\\$|\$(?=[\d.,]+$))\s*([\d.,\\!]+)(?:\\[)\]]|[\s$])*$", r"\1\2 \\text{dollar}"),
    (r"(?<!\\)\\[()\[\]$]|[\x00-\x20\x7f\"$`~]+", " "),  # what stands around maths
    (r"^ ?\*\*([^*]+)\*\*", r"\1 "), (r"^[ *=:≈]+|[ *.,;:]+$", ""),
    (r"^(?:\\approx|Rs\.?|US(?=\s*\d)|USD)(?![A-Za-z])\s*", ""), (r"(?<=[a-z])\.(?=\s|$|[a-z]\b)", ""),  # sq. ft., a.m.
    (r"(?<=\d)(?:\\!)?(?:,\\!|\{,\}|\\,)\s*(?=\d{3}(?!\d))", ""),  # 10,\!080
    (r"(?<![\d.])\d{1,3}(?:(?:_\d{3})+|(?:,\d{3})+(?![^(\[]*[)\]]))(?!\d)", lambda n: re.sub("[,_]", "", n[0])),
    (r"\\(?:text|mbox|hbox|textbf|textit|textrm|textnormal|textsf|mathrm|operatorname)\s*\{([^{}]*)\}", quote),
    (r"(?<=[\d}])\s*\\(?:(mu)\s*([A-Za-z])|(Omega))(?![A-Za-z])", r' "\1\2\3"'),  # a unit with a Greek letter
    (r"(?:\b[mM]\s*)?\\(?:angle|triangle|over\w+)\s*(?:\{([A-Z]{1,4})\}|(?=[A-Z]{1,4}\b))", r" \1 "),
    (r"\\begin\s*\{(?:[a-z]*matrix\}|array\}\s*\{[^{}]*\})", "⟦⟨"), ("&", ","),
    (r"(?:\\\\)?\s*\\end\s*\{(?:[a-z]*matrix|array)\}", "⟩⟧"), (r"\\\\", "⟩,⟨"),
    (r"\\([A-Za-z]+|[^{}])", lambda command: COMMANDS.get(command[1], command[0]) + " "),
    (r"\\(frac|binom|sqrt)\s*(\d)", r"\\\1{\2}"), (r"(\\(?:frac|binom)\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),  # \frac43
    (r"(?<![\d.^_])(\d+)\s*(?:\\frac\s*\{(\d+)\}\s*\{(\d+)\}|\s(\d+)/(\d+))",  # 1\frac45 is a sum, 1\frac54 is not
     lambda n: n[0] if int(n[2] or n[4]) >= int(n[3] or n[5]) else f"({n[1]}+{n[2] or n[4]}/{n[3] or n[5]})"),
    *[(r"\|([^|]+)\|", r"\\abs{\1}")] * 2, (r"\^\s*\{\s*([\d°])\s*\}", r"^\1 "), (r"\^\s*°", "°"),
    (r"\^\s*\{?(\s*')+\s*\}?", "'"), (r"\b([fgh])\s*\^\s*\{\s*-1\s*\}\s*(?=\()", r"\1_{inverse}"),
    (r"°\s*\"?([CF])\"?(?=\s*$)", r' "deg\1"'), (r"(?<=\d)\s*\(([A-Za-z][A-Za-z. /]+)\)", r' "\1"'),  # 9 (apples)
    (r'^[\s{]*"\(?([A-Za-z])[).]*"[\s}]*$', r"\1"),  # a letter of multiple choice, and the one before a value
    (r'^\s*(?:"\([A-E]\)"|\([A-E]\)\s(?=\s*[\d\\]))', "")]]


def clean(text: str) -> str:
    """The text with LaTeX's and Unicode's variants in one spelling, and the words of \\text{…} in double quotes."""
    if not text.isascii():
        text = re.sub("[⁰¹²³⁴-⁹⁻]+", lambda power: "^{" + power[0] + "}", text.translate(CHARACTERS))
        text = re.sub("[¼-¾⅐-⅞]", lambda part: " " + part[0], text)  # 3½ is 3 1/2
        text = unicodedata.normalize("NFKC", text).replace("⁄", "/")
        text = "".join(str(unicodedata.decimal(c, c)) for c in text if unicodedata.category(c) not in ("Cf", "Mn"))
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip()


def tokens(text: str) -> list[str]:
    """Strings, each of a kind that its first character tells: a number, a letter, "words, a \\command, or a sign."""
    found = [""]
    for match in TOKEN.finditer(text):
        number, words, name, low, sign = match.groups(default="")
        bare, low, before, after = name.lstrip("\\"), low.strip("{}"), text[:match.start()], text[match.end():]
        symbol, ends = f"{bare}_{low}" if low else bare, found[-1][-1:] in ("/", "^")
        word = len(bare) > 1 and name == bare and name not in WORDS
        if found[-1][:1] == '"' and (ends or words or word or sign in ("/", "^")):
            found[-1] += ("" if ends or sign else " ") + match[0].strip('"')  # words in a row, and units: km/h, cm^2
        elif not name:
            number = ("0" + number if number[:1] == "." else number).rstrip(".").replace("{", "").replace("}", "")
            found.append(number or words or {"**": "^", "<=": "≤", ">=": "≥", ";": ","}.get(sign, sign))
        elif name in WORDS or name in MULTIPLES and found[-1][:1].isdigit():
            found += [WORDS[name]] if name in WORDS else ["*", str(MULTIPLES[name])]
        elif "\\" + bare in FUNCTIONS or bare in ("frac", "binom", "sqrt"):
            found += ["\\" + bare, "_", low] if low else ["\\" + bare]
        elif name != bare:
            found.append(symbol if bare in GREEK else name)
        elif (name in UNITS and len(name) == 1 and LETTER_UNIT.search(before)
              and re.match(r"(\^[23])?\s*([,/]|$)", after)):
            found.append(f'"{name}')
        elif len(name.rstrip("'")) == 1 or re.fullmatch("[A-Z]{2,4}", name) and name not in UNITS:  # AB is a segment
            found.append(symbol)
        # Two or three letters in alphabetical order, as products are written, beside a sign of a formula: 2xy, ab+c.
        elif (re.fullmatch("[a-z]{2,3}", name) and list(name) == sorted(set(name)) and name not in UNITS
              and (re.search(r"\d$|[-+*/^=({[}]\s*$", before) or re.match(r"\s*[-+*/^=)}\]]", after))):
            found += [*name[:-1], symbol[len(name) - 1:]]
        else:
            found.append(f'"{name}')
    return found[1:]


class Reader:
    """Recursive descent over the tokens of an answer; ± stands for `sign`, 1 or −1. Raises ValueError."""

    def __init__(self, found: list[str], sign: int):
        self.tokens, self.at, self.depth = [*found, "", "", "", ""], 0, 0
        self.signs = {"+": 1, "-": -1, "±": sign, "∓": -sign}

    def take(self, wanted) -> str:
        """The next token, moving past it, if it is one of those wanted; else ""."""
        token = self.tokens[self.at]
        self.at += bool(token) and token in wanted
        return token if token and token in wanted else ""

    def items(self, closing: tuple[str, ...], separators: str = ",∪") -> list[Tree]:
        """Items between separators, up to the closing token."""
        items = [self.item()]
        while sign := self.take(separators):
            self.take(",")  # "1, 2, and 3"
            items += [sign] * (sign in "|∩") + [self.item()]
        if self.tokens[self.at] not in closing:
            raise ValueError(f"unexpected {self.tokens[self.at] or 'end'!r}")
        self.at += 1
        return items

    def item(self) -> Tree:
        """A quantity, or a statement about one: x = 5, 1 < x ≤ 2, Area = 5."""
        label, sides, signs = self.tokens[self.at], [], []
        if label[:1] == '"':
            self.at += 1
            sides, signs = [label.lower()], [self.take("=:").replace(":", "=")]
        sides.append(self.quantity())
        while sign := self.take("=≈∈<>≤≥"):
            signs.append(sign)
            sides.append(self.quantity())
        return statement(sides, signs) if signs else sides[0]

    def quantity(self) -> Tree:
        """A formula or ratio, and its unit."""
        node = self.sum()
        while self.take(":"):
            node = (*(node if operation(node) == ":" else (":", node)), self.sum())
        last, words = self.tokens[self.at - 1], self.tokens[self.at]
        self.at += words[:1] == '"'
        unit = unit_of(words[1:], last) if words[:1] == '"' else "°" if last == "°" else ""
        return ("unit", node, unit) if unit else node

    def sum(self) -> Tree:
        node = self.product()
        while self.tokens[self.at] in self.signs:
            node = join("+", node, self.product())
        return node

    def product(self) -> Tree:
        node = self.power()
        while self.tokens[self.at] == "/" or self.take("*") or self.multiplies():
            node = join("*", node, ("/", self.power()) if self.take("/") else self.power())
        return node

    def multiplies(self) -> bool:
        """Whether the next token begins a factor: 2x, 3(4), 5√2, but no number does: neither 2 3 nor \\frac12 3."""
        token = self.tokens[self.at]
        return token[:1].isalpha() or token == "∞" or token in CLOSING or (token[:1] == "\\" and token != r"\}")

    def power(self) -> Tree:
        """An atom with its signs, !, ° or %, and exponent."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
        sign = 1
        while token := self.take(self.signs):
            sign *= self.signs[token]
        node = self.atom()
        for after in "!°%":
            node = (after, node) if self.take(after) else node
        node = ("^", node, self.power()) if self.take("^") else node
        self.depth -= 1
        return node if sign == 1 else negative(node)

    def atom(self) -> Tree:
        token = self.tokens[self.at]
        self.at += 1
        if token[:1].isdigit():
            return number(token)
        if token[:1].isalpha() or token == "∞":
            if not self.calls(token):
                return token
            self.at += 1
            return ("call", token, *self.items((")",), ",∪|∩"))
        if token in CLOSING:
            items, closing = self.items(CLOSING[token]), self.tokens[self.at - 1]
            if token in ("{", r"\{"):
                return unordered(items)
            return items[0] if len(items) == 1 and token + closing in ("()", "[]") else (token + closing, *items)
        if token in (r"\frac", r"\binom"):
            return (token, self.atom(), self.atom())
        if token == r"\sqrt":
            degree = unordered(self.items(("]",))) if self.take("[") else Fraction(2)
            return ("^", self.atom(), ("/", degree))
        if token in FUNCTIONS:
            return self.function(token)
        raise ValueError(f"unexpected {token or 'end'!r}")

    def calls(self, name: str) -> bool:
        """Whether a name is an unknown function, as in f(2), P(A|B) or y(0), and no factor, as in R(R+1) or k(x+1)."""
        alone = any(token == name and after != "(" for token, after in zip(self.tokens, self.tokens[1:]))
        short = re.match(r"(?:[fgh]|[A-Z]+)(?![a-z])", name) or ")" in self.tokens[self.at + 2:self.at + 4]
        return name not in CONSTANTS and self.tokens[self.at] == "(" and not alone and bool(short)

    def function(self, name: str) -> Tree:
        base = self.atom() if self.take("_") else None
        exponent = self.atom() if self.take("^") else None
        if exponent == -1 and "\\arc" + name[1:] in FUNCTIONS:
            name, exponent = "\\arc" + name[1:], None
        bracket = self.tokens[self.at] in CLOSING
        argument = self.atom() if bracket else self.power()
        while not bracket and self.multiplies() and self.tokens[self.at] not in FUNCTIONS:
            argument = join("*", argument, self.power())  # \sin 2x \cos x
        if operation(argument) == "°":
            argument = ("*", argument[1], "π", Fraction(1, 180))
        node = (name, argument) if base is None else ("*", (r"\ln", argument), ("/", (r"\ln", base)))
        return node if exponent is None else ("^", node, exponent)


def unit_of(words: str, last: str) -> str:
    """Words after a formula in one spelling: "square miles per hour" is mi^2/h. "" for a reason: 24 by symmetry."""
    counts, found = last[:1].isdigit() or last in (")", "}", "]", "%", "°", "π"), []  # then any noun may follow
    if counts and re.match("(?:because|since|by|due|hence|thus) ", words):
        return ""
    words = re.sub(r"\b(?:square|sq) (\w+)", r"\1^2", re.sub(r"\b(?:cubic|cu) (\w+)", r"\1^3", words.replace(".", "")))
    for name, exponent in re.findall(r"([^\s/^]+|/)(\^\S+)?", words):
        plain = name.lower().removesuffix("s")
        known = UNITS.get(name) or UNITS.get(plain)
        if name.lower() in MODIFIERS or not (known or counts) or known == "/" and not found:
            raise ValueError(f"{name!r} is no unit")
        found.append((known or plain) + exponent)
    if found[-1:] == ["/"]:
        raise ValueError("per what?")
    return " ".join(found).replace(" / ", "/")


def number(token: str) -> Tree:
    digits, _, base = token.partition("_")
    mantissa, _, exponent = digits.lower().partition("e" if not base else "_")
    places = len(mantissa.partition(".")[2])
    if len(exponent) > 4 or base and not all(int(digit) < int(base) <= 36 for digit in digits):
        raise ValueError("too large, or no number in this base")
    if places and not exponent:
        return ("decimal", Fraction(digits), Fraction(1, 10 ** places))
    return ("base", Fraction(digits), Fraction(base)) if base else Fraction(digits)


def operation(node: Tree) -> str:
    return node[0] if isinstance(node, tuple) else ""


def join(sign: str, left: Tree, right: Tree) -> Tree:
    """A sum or product with one more term: flat, so that its depth does not grow with its length."""
    return (sign, *(left[1:] if operation(left) == sign else [left]), right)


def negative(node: Tree) -> Tree:
    if operation(node) == "decimal":
        return ("decimal", -node[1], node[2])
    return -node if isinstance(node, Fraction) else ("*", Fraction(-1), node)


def unordered(items: list[Tree]) -> Tree:
    """One item, or a set in one unit, which the last may state for all: 5 dimes and 3 nickels are not understood."""
    if len(items) == 1:
        return items[0]
    units = {item[2] for item in items if operation(item) == "unit"}
    if (len(items) > MAX_ITEMS or any(operation(item) == "set" for item in items)
            or len(units) > 1 or units and operation(items[-1]) != "unit"):
        raise ValueError("too many items, a set of sets, or several units")
    node = ("set", *(item[1] if operation(item) == "unit" else item for item in items))
    return ("unit", node, *units) if units else node


def is_name(node: Tree) -> bool:
    """Whether it may stand before = only to name what follows: x, AB, |AB|, f(x), P(A), (x,y), sin A."""
    if operation(node) == "()":
        return all(isinstance(name, str) for name in node[1:]) and list(node[1:]) == sorted(set(node[1:]))
    if operation(node) in (r"\abs", r"\sin", r"\cos", r"\tan"):
        return isinstance(node[1], str) and (node[1].isupper() or node[1] in GREEK)
    return operation(node) == "call" or isinstance(node, str) and node not in CONSTANTS


def statement(sides: list[Tree], signs: list[str]) -> Tree:
    """What a chain of relations says: a formula, ("=", name, value), an equation ("=", left, right), or an interval."""
    named = is_name(sides[0])
    if signs[-1] == "≈" and not is_name(sides[-2]):  # 20000/π ≈ 6366.2 says 20000/π
        shown = sides[-1] if operation(sides[-1]) == "decimal" else ("decimal", sides[-1], 1)
        if not isinstance(shown[1], Fraction) or not rounds(shown, sides[-2]):
            raise ValueError("not its rounded value")
        sides, signs = sides[:-1], signs[:-1]
    if set(signs) <= set("=≈") or signs == ["∈"] and named:
        if all(same(side, sides[-1]) for side in sides[named:]):  # 37+48 = 85 says 85
            return ("=", sides[0], sides[-1]) if named else sides[-1]
        if signs == ["="]:
            return ("=", *sides)
    elif set(signs) <= set("<≤") or set(signs) <= set(">≥"):
        if signs[0] in ">≥":
            sides, signs = sides[::-1], ["<≤"[sign == "≥"] for sign in reversed(signs)]
        if len(sides) == 2:
            named = is_name(sides[0])
            sides = [INFINITE[1], *sides, "∞"][not named:4 - named]
            signs = ["<", *signs, "<"][not named:3 - named]
        if [is_name(side) for side in sides] == [False, True, False]:
            return ("=", sides[1], ("(["[signs[0] == "≤"] + ")]"[signs[1] == "≤"], sides[0], sides[2]))
    raise ValueError("a chain of different values, or an inequality that is no interval")


@lru_cache(maxsize=4096)
def read(text: str) -> Tree:
    """The expression tree of an answer; words, and formulas beyond this reader, are ("text", …), equal to itself.

    Raises InputError for what is too long or unbalanced, and for numbers that are undefined, as 1/0, or too large.
    """
    if len(text) > MAX_LENGTH:
        raise InputError(f"longer than {MAX_LENGTH} characters")
    if re.fullmatch("-?[0-9]+", text):  # as most are
        return Fraction(text)
    cleaned, items = clean(text), []
    try:
        for sign in (1, -1) if re.search("[±∓]", cleaned) else (1,):  # what either sign gives
            node = unordered(Reader(tokens(cleaned), sign).items(("",)))
            items += [item for item in (node[1:] if operation(node) == "set" else [node])
                      if sign == 1 or not any(same(item, other) for other in items)]
        node = unordered(items)
        if same(node, node):  # false, or an error, for what is undefined
            return node
        raise ValueError("undefined")
    except (ValueError, ArithmeticError) as error:
        letter = re.search("[A-Za-z]", re.sub(r"\\(?:frac|binom|sqrt|abs)", "", cleaned))
        if letter and len(re.findall(r"[(\[{]", cleaned)) == len(re.findall(r"[)\]}]", cleaned)):
            return ("text", as_words(cleaned))
        raise InputError(str(error)) from None


def as_words(cleaned: str) -> str:
    """All of a text, words of two letters or more in any case; an article before them says nothing."""
    words = re.findall(r"\\?[A-Za-z]+|\d+|[^\s\".,]", re.sub(r"\{(\w)\}", r"\1", cleaned))
    text = " ".join(word.lower() if len(word) > 1 else word for word in words)
    return re.sub("^(?:an?|the) (?=.)", "", text).strip("{} ")


# ----------------------------------------------------------------------------------------- judging: equality of meaning

CONSTANTS = {"π": math.pi, "e": math.e, "i": 1j, "∞": math.inf}
INFINITE = ("∞", negative("∞"))
STRUCTURES = ("set", "=", ":", "unit", "text", "()", "[]", "(]", "[)", "⟨⟩", "⟦⟧")  # others have a number as value


def is_correct(prediction: str | None, gold: str) -> bool:
    """Whether an extracted answer (or None) means the same as the gold answer; False if either cannot be read."""
    try:
        a, b = read(prediction or ""), read(gold)
        words = "text" in (operation(a), operation(b)) and as_words(clean(prediction)) == as_words(clean(gold))
        return words or same(a, b)
    except (ValueError, ArithmeticError):
        return False


def same(a: Tree, b: Tree) -> bool:
    """Whether two trees mean the same, with the licences of what a question sets and an answer may leave out.

    - A name, x = 5 or f(2) = 5 or (x,y) = (3,4): x = 5 says 5, but not y = 5. Equations may be multiples of each other.
    - A unit: 5 cm says 5, but neither 5 m nor 5 cm².
    - That it is a ratio: 3:4 says 3/4. (But 3:10 and 6:20 may be times of a day.)
    """
    kinds = (operation(a), operation(b))
    if kinds == ("=", "="):
        if a[1] == b[1] or is_name(a[1]) and is_name(b[1]) and same(a[1], b[1]):
            return same(a[2], b[2])
        a, b = [("+", left, negative(right)) for _, left, right in (a, b)]
        (x, _), (y, _) = [values(node)[2] or (0, 0) for node in (a, b)]
        return bool(x and y) and not equal(a, x) and equal(("*", a, y), ("*", b, x))
    if "=" in kinds:
        named, other = (a, b) if kinds[0] == "=" else (b, a)
        return is_name(named[1]) and same(named[2], other)
    if "unit" in kinds:
        (x, u), (y, v) = [n[1:] if kind == "unit" else (n, "%" * (kind == "%")) for n, kind in zip((a, b), kinds)]
        return (u == v or not u or not v) and same(x, y)
    if kinds == (":", ":"):
        pairs, times = list(zip(a[1:], b[1:])), all(len(node) == 3 and node[2] in range(10, 60) for node in (a, b))
        return len(a) == len(b) <= 6 and any(a[1:]) and any(b[1:]) and (a == b or not times) and all(
            equal(join("*", x, v), join("*", u, y)) for x, y in pairs for u, v in pairs)
    a, b = [("*", node[1], ("/", node[2])) if operation(node) == ":" and len(node) == 3 else node for node in (a, b)]
    if operation(a) not in STRUCTURES and operation(b) not in STRUCTURES:
        return equal(a, b)
    if operation(a) != operation(b) or len(a) != len(b) or operation(a) == "text":
        return a == b
    rest = list(b[1:])
    for item in a[1:]:
        match = next((n for n, other in enumerate(rest if a[0] == "set" else rest[:1]) if same(item, other)), None)
        if match is None:
            return False
        del rest[match]
    return True


def equal(a: Tree, b: Tree) -> bool:
    """Whether two formulas have the same value everywhere, with the licences of school mathematics.

    - A decimal of six or more significant digits, rounded or cut, equals what is no decimal: 0.333333 = 1/3.
    - p% equals p/100 and also, where p > 1, a bare p ("what percentage …?"). A bare p ≤ 1 is rather a fraction.
    - 52_8 equals a bare 52, and not its value 42: else a task of conversion would have its question for an answer.
    - A variable is compared at positive and at complex values near them, where √(ab) = √a√b; but |x − 1| is not x − 1.
    """
    if a in INFINITE or b in INFINITE:
        return a == b
    for one, other in ((a, b), (b, a)):
        if operation(one) == "base":
            return one[1:] == other[1:] if operation(other) == "base" else equal(one[1], other)
        if operation(one) == "%" != operation(other) and equal(one[1], other) and abs(values(other)[0][0]) > 1:
            return True
        if operation(one) == "decimal" != operation(other) and abs(one[1]) >= 10 ** 5 * one[2] and rounds(one, other):
            return True
    pairs = [(*x, *y) for x, y in zip(values(a), values(b)) if x and y]
    return len(pairs) >= 3 and all(abs(x - y) <= 16 * (x_error + y_error) + 1e-300 if x_error or y_error else x == y
                                   for x, x_error, y, y_error in pairs)


def rounds(decimal: Tree, other: Tree) -> bool:
    """Whether a decimal is a number, rounded or cut."""
    _, shown, last = decimal
    known, again = values(other)[:2]
    if not known or known is not again or abs(known[0].imag) > 1e-12 * abs(known[0]):  # no real number, or no one
        return False
    off = (Fraction(known[0].real) - shown) * (1 if shown > 0 else -1) / last
    return -0.5 <= off < 0.999999


# Formulas are equal if they agree at all of these points at which both have a value that tells something. A value is a
# pair: the number, and a bound of its rounding error, 0 for rational numbers, which must agree exactly.

POINTS = [(range(2, 9, 2), 0), (range(33, 64, 2), 10), (), (range(3, 10, 2), 0), (range(33, 64, 2), 3),
          (range(33, 64, 2), 15), (), (range(10, 41), 0), (range(33, 64, 2), 7), (range(100, 1000), 0),
          (range(33, 64, 2), 13), (range(33, 64, 2), 5), (range(65, 512, 2), 1), (range(33, 64, 2), 17)]
EPSILON = 2.0 ** -52  # of doubles
MAX_BITS = 2 ** 16, 2 ** 13  # of a numerator, a denominator


@lru_cache(maxsize=4096)
def variable(name: str, point: int) -> Fraction | complex:
    """A variable's value at a point, random but fixed: an even, an odd or any integer, a fraction, a complex number."""
    rng = random.Random(f"{name} {point}")
    if not POINTS[point]:
        return cmath.rect(rng.uniform(0.6, 1.6), rng.uniform(0.2, 0.5) * rng.choice((1, -1)))
    sizes, power = POINTS[point]
    return Fraction(rng.choice(sizes), 2 ** power)


def variables(node: Tree) -> int:
    """How many variables there are in a formula, each time that it stands there."""
    if isinstance(node, tuple):
        return sum(map(variables, node[1:]))
    return int(isinstance(node, str) and node not in CONSTANTS)


@lru_cache(maxsize=4096)
def values(node: Tree) -> list[tuple | None]:
    """Values of a formula at the points, None where it has none: at fewer points for a long one, which would cost."""
    found, count = [], variables(node)
    for point in range(max(4, min(len(POINTS), 300 // count)) if count else 1):
        try:
            found.append(value(node, point))
        except (ValueError, ArithmeticError):
            found.append(None)
    return [*found, *[None if count else found[0]] * len(POINTS)][:len(POINTS)]


def value(node: Tree, point: int) -> tuple:
    """The number that a formula is at a point, and a bound of its rounding error."""
    if isinstance(node, str):
        node = CONSTANTS[node] if node in CONSTANTS else variable(node, point)
    if not isinstance(node, tuple):
        return node, 0.0 if isinstance(node, Fraction) else EPSILON * abs(node)
    name, *arguments = node
    if name in STRUCTURES:
        raise ValueError("a list or a statement within a formula")
    known = [value(argument, point) for argument in arguments]
    xs = [x for x, _ in known]
    if name == "call":
        rng = random.Random(f"{node[1]} {[f'{complex(x):.11e}' for x in xs]} {point}")
        return Fraction(rng.randint(100, 999) * rng.choice((1, -1)), 512), 0.0
    y = OPERATIONS[name](*xs)
    if isinstance(y, Fraction):
        return product(y), 0.0
    if not cmath.isfinite(y) or abs(y) < 1e-300 and name in ("^", r"\exp"):
        raise OverflowError("too large or too small")
    total, errors = EPSILON * abs(y), [error or EPSILON * float(abs(x)) for x, error in known]
    size = max(map(abs, xs))
    for n, (x, error) in enumerate(zip(xs, errors)):
        if name == "+" and 16 * error < abs(x) < 4e-9 * size:
            raise ValueError("a term that is lost in the rounding, as e^{-200t} beside 1")
        step = max(error, 1e-7 * abs(x)) or 1.0
        change = step if name == "+" else abs(y / x) * step if name == "*" and x else abs(
            OPERATIONS[name](*xs[:n], x + step, *xs[n + 1:]) - y)
        if change == 0 != error and name in FUNCTIONS and name != r"\abs":
            raise ValueError("flat: tanh 30 is 1 in doubles")
        total += change / step * error
    return complex(y), total


def product(*xs: Fraction | complex) -> Fraction | complex:
    if not all(isinstance(x, Fraction) for x in xs):
        return math.prod(xs)
    parts = [x.numerator for x in xs], [x.denominator for x in xs]
    if any(sum(map(int.bit_length, part)) > limit for part, limit in zip(parts, MAX_BITS)):
        raise OverflowError("too large")
    return Fraction(*map(math.prod, parts))


def power(x: Fraction | complex, y: Fraction | complex) -> Fraction | complex:
    """x^y, exact for an integer exponent; the real root for an odd root of a negative number."""
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        if y.denominator == 1:
            if (max(abs(x.numerator), x.denominator).bit_length() - 1) * abs(y) > MAX_BITS[x.denominator > 1]:
                raise OverflowError("too large")
            return x ** int(y)
        if x < 0 and y.denominator % 2:
            return (-1) ** y.numerator * complex(-x) ** complex(y)
    return complex(x) ** complex(y)


OPERATIONS = FUNCTIONS | {
    "+": lambda *xs: sum(xs), "*": product,
    "/": lambda x: 1 / x, r"\frac": lambda x, y: product(x, 1 / y), "^": power, "%": lambda x: x / 100,
    "°": lambda x: x, "!": lambda x: Fraction(math.factorial(range(301).index(x))),
    r"\binom": lambda n, k: Fraction(math.comb(*map(range(1001).index, (n, k)))),
    "decimal": lambda x, last: x, "base": lambda digits, base: digits}


def show(node: Tree) -> str:
    return f"{node[0]}({', '.join(map(show, node[1:]))})" if isinstance(node, tuple) else str(node)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print('rewards.py: usage: python rewards.py "completion or answer" "gold answer"', file=sys.stderr)
        sys.exit(2)
    extracted = extract_answer(sys.argv[1])
    print("extracted:", extracted)
    for title, given in (("read as:", extracted), ("gold as:", sys.argv[2])):
        try:
            print(title, show(read(given or "")))
        except InputError as problem:
            print(title, "cannot be read:", problem)
    print("verdict:", "right" if is_correct(extracted, sys.argv[2]) else "wrong")
