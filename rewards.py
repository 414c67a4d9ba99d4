"""Problems and verdicts: load problems, extract an answer, judge it, and turn rewards into group advantages.

    problems = load_problems("gsm8k", "train", count=256)
    r = reward(completion, problems[0].answer)         # 1.0 or 0.0
    advantages = group_advantages(rewards, groups)     # [B]

`python rewards.py "completion or answer" "gold"` shows what is extracted, how each side is read, and the verdict.
"""
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

import torch
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
        if not is_correct(gold, gold):
            raise InputError(f"{source}, problem {n}: cannot read the gold answer {gold[-80:]!r} ({question[:60]!r})")
    return [problems[n] for n in chosen]


def load_rows(source: str, split: str) -> tuple[list[dict], bool]:
    """The rows (dicts) of the split, True; but all rows, False, if the source has a single split, yet to be divided."""
    if source.endswith((".jsonl", ".parquet")) and not Path(source).is_file():
        raise InputError(f"no such file: {source}")
    if source.endswith(".jsonl"):
        splits, names = {"all": read_jsonl(source)}, {}
    elif source.endswith(".parquet") or source in SHORT_NAMES or "/" in source:
        from datasets import load_dataset  # slow to import

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
    gold = "" if answer is None else str(answer)
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
STATEMENT = re.compile(r"\banswer\s{0,3}\**\s?(?:is|:|=)[\s:*=]{0,10}", re.IGNORECASE)
SENTENCE_END = re.compile(r"\.(?:\s|$)|\s(?:because|since|so|as|which|where)\s|,\s(?=[a-z]{2})")
FORMULA = re.compile(r"\$[^$]+\$|\\\(.+?\\\)|\\\[.+?\\\]")
NUMBER = re.compile(r"(?:(?<![\w)}])[-−])?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?(?:\\?%)?")


def extract_answer(text: str) -> str | None:
    """The answer that a completion states in its last 10,000 characters, as text, or None.

    In this order: the last balanced \\boxed{…} or \\fbox{…}; the last `#### …`; the last "the answer is …" or
    "Answer: …"; the last formula or number of the last line. Where a text is ambiguous:
    - Text after the box, other statements included, is ignored: the box is the form that prompts ask for.
    - Of two different boxes the last counts: models correct themselves, and as only one is judged, nothing is gained
      by boxing several guesses.
    - An unclosed box and all after it is ignored (an earlier box counts, else None): a completion cut off at
      `\\boxed{1` may have been on its way to 12.
    - An empty box is no box: prompts, and completions that repeat them, contain `\\boxed{}`.
    """
    text = text[-10_000:]  # 100 kB of anything must cost nothing
    box = last_box(text)
    if box is not None:
        return box or None
    marked = re.findall(r"####\s*([-+−$\\(\[{.\d][^\n]*)", text)  # a heading, "#### Step", is no answer
    if marked:
        return marked[-1].strip()
    statements = list(STATEMENT.finditer(text))
    if statements:
        line = text[statements[-1].end():].split("\n")[0][:MAX_LENGTH]
        words = SENTENCE_END.split(line)[0].strip(" *`.")
        candidates = [words, *FORMULA.findall(line)[:1], *NUMBER.findall(line)[:1]]
    else:
        line = text.strip().split("\n")[-1][-MAX_LENGTH:]
        words, last = line.strip(" *`."), line.split("=")[-1]
        prose = re.search(r"[A-Za-z]{2}\s+[A-Za-z]{2}", last)  # "do" must not be d·o
        candidates = [*FORMULA.findall(line)[-1:], *([] if prose else [last]), *NUMBER.findall(line)[-1:]]
        words = words if words.isalpha() else None
    return next(filter(is_formula, candidates), words or None)


def last_box(text: str) -> str | None:
    """Inside of the last whole box, "" if there is none but an unclosed one, None without either."""
    unclosed = None
    for box in reversed(list(BOX.finditer(text))[-20:]):
        if box[1]:  # \boxed 7
            return box[1]
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", text[box.end():box.end() + 2 * MAX_LENGTH]):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                inside = text[box.end():box.end() + brace.start()].strip()
                break
        if depth == 0 and inside:
            return inside
        unclosed = "" if depth else unclosed
    return unclosed


def is_formula(text: str) -> bool:
    try:
        return operation(read(text)) != "text"
    except InputError:
        return False


# ----------------------------------------------------------------------------- reading: from text to an expression tree

# A tree is a Fraction, the name of a symbol, or a tuple (operation, *arguments). No text can cost much: its length, the
# depth of nesting, the items to match in any order and the size of exact numbers are limited.

Tree = Fraction | str | tuple
Number = Fraction | float | complex
MAX_LENGTH = 500  # characters of an answer
MAX_DEPTH = 24  # brackets, fractions, roots and exponents in one another
MAX_ITEMS = 32  # of a set
MAX_BITS = 2048  # of a numerator or denominator


def invert(table: dict[str, str]) -> dict[str, str]:
    return {name: sign for sign, names in table.items() for name in names.split()}


COMMANDS = invert({  # of LaTeX: the many spellings of one sign, and what only changes the looks
    "*": "cdot times ast", "/": "div", ":": "colon", "±": "pm", "∓": "mp", "π": "pi", "∞": "infty", "°": "circ degree",
    "∪": "cup", "∈": "in", "≤": "le leq leqslant", "≥": "ge geq geqslant", "<": "lt", ">": "gt", "=": "approx",
    "%": "%", "|": "vert lvert rvert mid", r"\{": "lbrace", r"\}": "rbrace", "⟨": "langle", "⟩": "rangle",
    r"\frac": "dfrac tfrac cfrac", r"\binom": "dbinom tbinom",
    " ": "left right big Big bigl bigr Bigl Bigr displaystyle textstyle limits quad qquad mathbb mathbf mathcal mathit "
         "boldsymbol bf rm boxed fbox , ! ; : > $ # ( ) [ ]"}) | {" ": " "}
WORDS = invert({"π": "pi", "∞": "infinity inf", "°": "degrees degree", "%": "percent", ",": "or and", "∪": "union",
                r"\sqrt": "sqrt", r"\arcsin": "asin", r"\arccos": "acos", r"\arctan": "atan"})
UNITS = set("cm mm km in ft yd mi kg mg lb lbs oz ml hr min sec deg mph no not for any".split())  # and short words
GREEK = set("alpha beta gamma delta epsilon varepsilon zeta eta theta lambda mu nu xi rho sigma tau phi varphi chi psi "
            "omega ell Gamma Delta Theta Lambda Sigma Phi Psi Omega".split())
CHARACTERS = str.maketrans("−–×·⋅∙∗÷∕⁄º≈", "--*****///°=", "€£") | {ord("√"): " sqrt "}
FUNCTIONS = {
    r"\sin": cmath.sin, r"\cos": cmath.cos, r"\tan": cmath.tan, r"\cot": lambda z: 1 / cmath.tan(z),
    r"\sec": lambda z: 1 / cmath.cos(z), r"\csc": lambda z: 1 / cmath.sin(z), r"\arcsin": cmath.asin,
    r"\arccos": cmath.acos, r"\arctan": cmath.atan, r"\sinh": cmath.sinh, r"\cosh": cmath.cosh, r"\tanh": cmath.tanh,
    r"\exp": cmath.exp, r"\ln": cmath.log, r"\log": cmath.log10, r"\abs": abs}  # log without a base: as in school
CLOSING = {"(": (")", "]"), "[": (")", "]"), "{": ("}",), r"\{": (r"\}",), "⟨": ("⟩",), "⟦": ("⟧",)}
TOKEN = re.compile(r"""(\d+_(?:\d+|\{\d+\})|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?) | ("[^"]*")
                       | (\\?[A-Za-z]+)(?:_(\w|\{[^{}]*\}))? | (\*\*|<=|>=|\\[{}]|\S)""", re.VERBOSE)


def clean(text: str) -> str:
    """The text with LaTeX's and Unicode's variants in one spelling, and the words of \\text{…} in double quotes."""
    if not text.isascii():
        text = re.sub("[⁰¹²³⁴-⁹⁻]+", lambda power: "^{" + power[0] + "}", text.translate(CHARACTERS))
        text = re.sub("[¼-¾⅐-⅞]", lambda part: " " + part[0], text)  # 3½ is 3 1/2
        text = unicodedata.normalize("NFKC", text).replace("⁄", "/")
        text = "".join(str(unicodedata.decimal(c, c)) for c in text if unicodedata.category(c) not in ("Cf", "Mn"))
    text = re.sub(r"[\x00-\x20\x7f\"$`~]+", " ", text.replace(r"\$", "")).rstrip(" *.,;:").lstrip(" *=:")
    text = re.sub(r"(?<=\d)(?:\\!)?(?:,\\!|\{,\}|\\,)\s*(?=\d{3}(?!\d))", "", text)  # 10,\!080
    if not re.search(r"[(\[]|\\\{", text):  # a comma before three digits separates thousands, but (100,200) is a point
        text = re.sub(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?!\d)", lambda number: number[0].replace(",", ""), text)
    text = re.sub(r"\\(?:text|mbox|textbf|textit|textrm|mathrm|operatorname)\s*\{([^{}]*)\}", quote, text)
    text = re.sub(r"\\begin\s*\{(?:[a-z]*matrix\}|array\}\s*\{[^{}]*\})", "⟦⟨", text).replace("&", ",")
    text = re.sub(r"(?:\\\\)?\s*\\end\s*\{(?:[a-z]*matrix|array)\}", "⟩⟧", text).replace(r"\\", "⟩,⟨")
    text = re.sub(r"\\([A-Za-z]+|[^{}])", lambda command: COMMANDS.get(command[1], command[0]) + " ", text)
    text = re.sub(r"\\(frac|binom|sqrt)\s*(\d)", r"\\\1{\2}", text)  # \frac43
    text = re.sub(r"(\\(?:frac|binom)\s*\{[^{}]*\})\s*(\d)", r"\1{\2}", text)
    text = re.sub(r"(?<![\d.^_])(\d+)\s*(?:\\frac\s*\{(\d+)\}\s*\{(\d+)\}|\s(\d+)/(\d+))", mixed, text)
    text = re.sub(r"\|([^|]+)\|", r"\\abs{\1}", re.sub(r"\|([^|]+)\|", r"\\abs{\1}", text))
    text = re.sub(r"\^\s*(?:°|\{\s*°\s*\})", "°", text)
    text = re.sub(r'^[\s{]*"\(?([A-Za-z])[).]*"[\s}]*$', r"\1", text)  # a letter of multiple choice
    # Labels go: f(x) = …, x ∈ …, "Area" = …, "(C)" 12.
    return re.sub(r'^\s*(?:[A-Za-z]\s*\([a-z]\)\s*=|[A-Za-z]\s*∈|"[^"]*"\s*[=:]|"\([A-E]\)")', "", text).strip()


def quote(command: re.Match) -> str:
    words = command[1].strip().replace("\\", "")
    symbol = command[0].startswith(r"\mathrm") and len(words) == 1
    formula = symbol or words in WORDS or "\\" + words in FUNCTIONS or re.search(r"\d", words)  # 5\text{ or 7} is no 5
    return f" {words} " if formula else f' "{words}" '


def mixed(match: re.Match) -> str:
    """1\\frac{4}{5} and 1 4/5 are sums; with an improper fraction it is a product."""
    whole, top, bottom = match[1], match[2] or match[4], match[3] or match[5]
    return f"({whole}+{top}/{bottom})" if int(top) < int(bottom) else match[0]


def tokens(text: str) -> list[str]:
    """Strings, each of a kind that its first character tells: a number, a letter, a "word", a \\command, or a sign."""
    found = []
    for number, words, name, low, sign in TOKEN.findall(text):
        bare, low = name.lstrip("\\"), low.strip("{}")
        if not name:
            number = ("0" + number if number[:1] == "." else number).rstrip(".").replace("{", "").replace("}", "")
            found.append(number or words or {"**": "^", "<=": "≤", ">=": "≥", ";": ","}.get(sign, sign))
        elif name in WORDS:
            found.append(WORDS[name])
        elif "\\" + bare in FUNCTIONS or bare in ("frac", "binom", "sqrt"):
            found += ["\\" + bare, "_", low] if low else ["\\" + bare]
        elif name != bare:
            found.append(f"{bare}_{low}" if bare in GREEK else name)
        # Up to three letters are a product if in alphabetical order, as products are written: xyz. Others are a word.
        elif name in UNITS or len(name) > 3 or (len(name) == 3 and list(name) != sorted(set(name))):
            found.append(f'"{name}"')
        else:
            found += [*name[:-1], f"{name[-1]}_{low}" if low else name[-1]]
    return found


class Reader:
    """Recursive descent over the tokens of an answer; ± stands for `sign`, 1 or −1. Raises ValueError."""

    def __init__(self, found: list[str], sign: int):
        self.tokens, self.at, self.depth = [*found, "", "", ""], 0, 0
        self.signs = {"+": 1, "-": -1, "±": sign, "∓": -sign}

    def take(self, wanted: str) -> bool:
        """The next token, moving past it, if it is one of those wanted; else ""."""
        token = self.tokens[self.at]
        if not token or token not in wanted:
            return ""
        self.at += 1
        return token

    def items(self, closing: tuple[str, ...]) -> list[Tree]:
        """Items between commas, up to the closing token."""
        items = [self.item()]
        while self.take(",∪"):
            self.take(",")  # "1, 2, and 3"
            items.append(self.item())
        if self.tokens[self.at] not in closing:
            raise ValueError(f"unexpected {self.tokens[self.at] or 'end'!r}")
        self.at += 1
        return items

    def item(self) -> Tree:
        """A formula, or a statement about one: x = 5, 1 < x ≤ 2."""
        sides, signs = [self.formula()], []
        while sign := self.take("=<>≤≥"):
            signs.append(sign)
            sides.append(self.formula())
        return statement(sides, signs) if signs else sides[0]

    def formula(self, level: int = 1) -> Tree:
        """A sum and its unit (level 1), a product (2), a product without signs (3), a signed power (4), an atom (5)."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
        sign = 1
        while level < 5 and (token := self.take(self.signs)):
            sign *= self.signs[token]
        node = self.atom()
        for after in "!°%" if level < 5 else "":
            node = (after, node) if self.take(after) else node
        if level < 5 and self.take("^"):
            node = ("^", node, self.formula(4))
        node = node if sign == 1 else negative(node)
        while True:
            if level == 1 and self.tokens[self.at] in self.signs:
                node = join("+", node, self.formula(2))
            elif level <= 2 and self.take("*"):
                node = join("*", node, self.formula(4))
            elif level <= 2 and self.take("/:"):
                node = join("*", node, ("/", self.formula(4)))
            elif level <= 3 and self.multiplies() and (level < 3 or self.tokens[self.at] not in FUNCTIONS):
                node = join("*", node, self.formula(4))
            else:
                break
        while level == 1 and self.tokens[self.at].startswith('"'):  # a unit: cm^2, km/h, miles per hour
            self.at += 3 if self.tokens[self.at + 1] == "/" else 1
            if self.take("^"):
                node = ("unit", node, self.formula(5))
        self.depth -= 1
        return node

    def multiplies(self) -> bool:
        """Whether the next token begins a factor: 2x, 3(4), 5√2, but not 2 3."""
        token, before = self.tokens[self.at], self.tokens[self.at - 1]
        if token[:1].isdigit() and before[:1].isdigit():
            raise ValueError("two numbers side by side")
        return token[:1].isalnum() or token == "∞" or token in CLOSING or (token[:1] == "\\" and token != r"\}")

    def atom(self) -> Tree:
        token = self.tokens[self.at]
        self.at += 1
        if token[:1].isdigit():
            return number(token)
        if token[:1].isalpha() or token == "∞":
            return token
        if token in CLOSING:
            items, closing = self.items(CLOSING[token]), self.tokens[self.at - 1]
            if token in ("{", r"\{"):
                return unordered(items)
            return items[0] if len(items) == 1 and token + closing in ("()", "[]") else (token + closing, *items)
        if token == r"\frac":
            return ("*", self.formula(5), ("/", self.formula(5)))
        if token == r"\binom":
            return (token, self.formula(5), self.formula(5))
        if token == r"\sqrt":
            degree = unordered(self.items(("]",))) if self.take("[") else Fraction(2)
            return ("^", self.formula(5), ("/", degree))
        if token in FUNCTIONS:
            return self.function(token)
        raise ValueError(f"unexpected {token or 'end'!r}")

    def function(self, name: str) -> Tree:
        base = self.formula(5) if self.take("_") else None
        exponent = self.formula(5) if self.take("^") else None
        if exponent == -1 and "\\arc" + name[1:] in FUNCTIONS:
            name, exponent = "\\arc" + name[1:], None
        argument = self.formula(5 if self.tokens[self.at] in CLOSING else 3)
        if operation(argument) == "°":
            argument = ("*", argument[1], "π", Fraction(1, 180))
        node = (name, argument) if base is None else ("*", (r"\ln", argument), ("/", (r"\ln", base)))
        return node if exponent is None else ("^", node, exponent)


def number(token: str) -> Tree:
    digits, _, base = token.partition("_")
    mantissa, _, exponent = digits.lower().partition("e")
    if len(exponent) > 4:
        raise ValueError("too large")
    places = len(mantissa.partition(".")[2])
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
    if len(items) == 1:
        return items[0]
    if len(items) > MAX_ITEMS or any(operation(item) == "set" for item in items):
        raise ValueError("too many items, or a set of sets")
    return ("set", *items)


def statement(sides: list[Tree], signs: list[str]) -> Tree:
    """What a chain of relations says: a formula, ("=", name, value), an equation ("=", left, right), or an interval."""
    if set(signs) <= set(">≥"):
        sides, signs = sides[::-1], ["<≤"[sign == "≥"] for sign in reversed(signs)]
    names = [isinstance(side, str) and side not in CONSTANTS for side in sides]
    if set(signs) == {"="}:
        if all(same(side, sides[-1]) for side in sides[names[0]:]):  # 37+48 = 85 says 85
            return ("=", sides[0], sides[-1]) if names[0] else sides[-1]
        if len(sides) == 2:
            return ("=", *sides)
    elif set(signs) <= set("<≤"):
        if len(sides) == 2:
            sides, signs = ([*sides, "∞"], [*signs, "<"]) if names[1] else ([negative("∞"), *sides], ["<", *signs])
            names = [False, names[0] or names[1], False]
        if names == [False, True, False]:
            return ("(["[signs[0] == "≤"] + ")]"[signs[1] == "≤"], sides[0], sides[2])
    raise ValueError("a chain of different values, or an inequality that is no interval")


@lru_cache(maxsize=4096)
def read(text: str) -> Tree:
    """The expression tree of an answer; words, and formulas beyond this reader, are ("text", …), equal to itself.

    Raises InputError for what is too long or unbalanced, and for numbers that are undefined, as 1/0, or too large.
    """
    if len(text) > MAX_LENGTH:
        raise InputError(f"longer than {MAX_LENGTH} characters")
    cleaned = clean(text)
    try:
        found = tokens(cleaned)
        node = unordered(Reader(found, 1).items(("",)))
        if re.search("[±∓]", cleaned):  # what either sign gives
            other = unordered(Reader(found, -1).items(("",)))
            items = [item for both in (node, other) for item in (both[1:] if operation(both) == "set" else [both])]
            node = unordered([item for n, item in enumerate(items) if not any(same(item, x) for x in items[:n])])
        if same(node, node):  # false, or an error, for what is undefined
            return node
        raise ValueError("undefined")
    except (ValueError, ArithmeticError) as error:
        letter = re.search("[A-Za-z]", re.sub(r"\\(?:frac|binom|sqrt|abs)", "", cleaned))
        if letter and cleaned.count("{") == cleaned.count("}"):
            return ("text", as_words(cleaned))
        raise InputError(str(error)) from None


def as_words(cleaned: str) -> str:
    text = re.sub(r"[\s\"]", "", cleaned)
    return text.strip("{}").lower() if re.fullmatch("[A-Za-z.,'{}-]*", text) else text


# ----------------------------------------------------------------------------------------- judging: equality of meaning

CONSTANTS = {"π": math.pi, "e": math.e, "i": 1j, "∞": math.inf}
STRUCTURES = ("set", "=", "text", "()", "[]", "(]", "[)", "⟨⟩", "⟦⟧")  # all other trees have a number for their value


def is_correct(prediction: str | None, gold: str) -> bool:
    """Whether an extracted answer (or None) means the same as the gold answer; False if either cannot be read."""
    try:
        a, b = read(prediction or ""), read(gold)
        words = "text" in (operation(a), operation(b)) and as_words(clean(prediction)) == as_words(clean(gold))
        return words or same(a, b)
    except (ValueError, ArithmeticError):
        return False


def same(a: Tree, b: Tree) -> bool:
    """Whether two trees mean the same. A name is optional: x = 5 and 5 are the same, x = 5 and y = 5 are not."""
    if operation(a) == operation(b) == "=" and a[1] != b[1]:  # multiples of each other, as 2x = 10 and x = 5?
        a2, a3, b2, b3 = [value(left, at) - value(right, at) for _, left, right in (a, b) for at in (2, 3)]
        return a2 != 0 != b2 and close(a2 * b3, a3 * b2)
    if "=" in (operation(a), operation(b)) and operation(a) != operation(b):
        named, other = (a, b) if operation(a) == "=" else (b, a)
        return isinstance(named[1], str) and same(named[2], other)
    if operation(a) not in STRUCTURES and operation(b) not in STRUCTURES:
        return equal(a, b)
    if operation(a) != operation(b) or len(a) != len(b) or operation(a) == "text":
        return a == b
    if operation(a) != "set":
        return all(map(same, a[1:], b[1:]))
    rest = list(b[1:])
    for item in a[1:]:
        match = next((index for index, other in enumerate(rest) if same(item, other)), None)
        if match is None:
            return False
        del rest[match]
    return True


def equal(a: Tree, b: Tree) -> bool:
    """Whether two formulas have the same value everywhere, with the licences of school mathematics.

    They are compared exactly at two integer points if rational there, else in double precision at two complex points.
    - A decimal of six or more significant digits equals what differs from it by less than one unit of its last place:
      0.333333 = 1/3. An integer is never that near without being equal, nor another decimal with as many places.
    - p% equals p/100 and also, where p > 1, a bare p ("what percentage …?"). A bare p ≤ 1 is rather a fraction.
    - 52_8 equals a bare 52, and not its value 42: else a task of conversion would have its question for an answer.
    Units are not compared, as the question sets them, but for their exponents if both sides have one.
    """
    if operation(a) == operation(b) == "unit" and a[2] != b[2]:
        return False
    a, b = [node[1] if operation(node) == "unit" else node for node in (a, b)]
    for one, other in ((a, b), (b, a)):
        if operation(one) == "base":
            return one[1:] == other[1:] if operation(other) == "base" else equal(one[1], other)
        if operation(one) == "%" != operation(other) and abs(value(other, 0)) > 1 and equal(one[1], other):
            return True
        if operation(one) == "decimal" and abs(one[1]) >= 10 ** 5 * one[2] > abs(value(other, 0) - one[1]) * 10 ** 5:
            return True
    try:
        exact = [value(node, point) for point in (0, 1) for node in (a, b)]
        if all(isinstance(x, Fraction) for x in exact):
            return exact[0::2] == exact[1::2]
    except (ValueError, ArithmeticError):
        pass  # too large at an integer, or undefined for a negative number
    return all(close(value(a, point), value(b, point)) for point in (2, 3))


def close(x: Number, y: Number) -> bool:
    """Rational numbers must be identical, others may differ by the rounding of doubles: 1e-11, relative."""
    if x == y or math.inf in (x, y) or -math.inf in (x, y) or (isinstance(x, Fraction) and isinstance(y, Fraction)):
        return x == y
    return abs(complex(x) - complex(y)) <= 1e-11 * max(abs(complex(x)), abs(complex(y)), 1e-4)


def value_at(node: Tree, point: int) -> Number:
    """Value of a formula at a point: a Fraction if all in it is rational, else complex or float."""
    if isinstance(node, Fraction):
        return node
    if isinstance(node, str):
        return CONSTANTS[node] if node in CONSTANTS else variable_at(node, point)
    if node == negative("∞"):
        return -math.inf
    if node[0] in STRUCTURES:
        raise ValueError("a list or a statement within a formula")
    x, *more = [value_at(argument, point) for argument in node[1:]]
    if node[0] not in ("+", "*"):
        return bounded(OPERATIONS[node[0]](x, *more))
    for y in more:
        x = bounded(x + y if node[0] == "+" else x * y)
    return x


value = lru_cache(maxsize=4096)(value_at)  # of whole trees: within them, hashing would cost more than computing


@lru_cache(maxsize=4096)
def variable_at(name: str, point: int) -> Number:
    """A variable's value at one of four fixed random points: integers at 0 and 1, complex numbers at 2 and 3.

    The complex numbers lie near 1, where √(ab) = √a√b and log(ab) = log a + log b hold as they do for positive numbers,
    and yet |x| is not x.
    """
    rng = random.Random(f"{name} {point}")
    if point < 2:
        return Fraction(rng.randint(100, 999) * (1, -1)[point])
    return cmath.rect(rng.uniform(0.9, 1.1), rng.uniform(0.2, 0.5) * rng.choice((1, -1)))


def bounded(x: Number) -> Number:
    if isinstance(x, Fraction):
        if max(x.numerator.bit_length(), x.denominator.bit_length()) > MAX_BITS:
            raise OverflowError("too large")
    elif not cmath.isfinite(x):
        raise ValueError("undefined")
    return x


def power(x: Number, y: Number) -> Number:
    """x^y, exact for an integer exponent; the real root for an odd root of a negative number."""
    if not (isinstance(x, Fraction) and isinstance(y, Fraction)):
        return complex(x) ** complex(y)
    if y.denominator == 1:
        if (max(abs(x.numerator), x.denominator).bit_length() - 1) * abs(y) > MAX_BITS:
            raise OverflowError("too large")
        return x ** int(y)
    if x < 0 and y.denominator % 2:
        return (-1) ** y.numerator * float(-x) ** float(y)
    return complex(x) ** complex(y)


def natural(x: Number, limit: int) -> int:
    if not isinstance(x, Fraction) or x.denominator != 1 or not 0 <= x <= limit:
        raise ValueError("not a natural number, or too large")
    return int(x)


OPERATIONS = FUNCTIONS | {
    "/": lambda x: 1 / x, "^": power, "%": lambda x: x / 100, "°": lambda x: x,
    "!": lambda x: Fraction(math.factorial(natural(x, 300))),
    r"\binom": lambda n, k: Fraction(math.comb(natural(n, 1000), natural(k, 1000))),
    "decimal": lambda x, last: x, "base": lambda digits, base: digits, "unit": lambda x, exponent: x}


def show(node: Tree) -> str:
    return f"{node[0]}({', '.join(map(show, node[1:]))})" if isinstance(node, tuple) else str(node)


def main(arguments: list[str]) -> None:
    if len(arguments) != 2:
        raise InputError('usage: python rewards.py "completion or answer" "gold answer"')
    answer, gold = extract_answer(arguments[0]), arguments[1]
    print("extracted:", answer)
    for name, text in (("read as:", answer), ("gold as:", gold)):
        try:
            print(name, show(read(text or "")))
        except InputError as error:
            print(name, "cannot be read:", error)
    print("verdict:", "right" if is_correct(answer, gold) else "wrong")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        print(f"rewards.py: {error}", file=sys.stderr)
        sys.exit(2)
