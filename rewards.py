"""Problems and verdicts: load problems, extract an answer, judge it, and turn rewards into group advantages.

    problems = load_problems("gsm8k", "train", count=256)
    r = reward(completion_text, problems[0].answer)                    # 1.0 or 0.0
    advantages = group_advantages(rewards, groups)                     # [B]
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


class InputError(ValueError):
    """A mistake in what the user gave. The message is one line that names the value and the way out."""


# --- Problems ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """`question` as it is put to the model; `answer` is the gold text, taken out of `#### n` or \\boxed{}."""
    question: str
    answer: str


# Short name -> (hub path, config, {our split: the publisher's split}).
SHORT_NAMES = {
    "gsm8k": ("openai/gsm8k", "main", {"train": "train", "test": "test"}),
    "math500": ("HuggingFaceH4/MATH-500", None, {"train": "test", "test": "test"}),
    "aime24": ("HuggingFaceH4/aime_2024", None, {"train": "train", "test": "train"}),
    "aime25": ("math-ai/aime25", None, {"train": "test", "test": "test"}),
    "polaris": ("POLARIS-Project/Polaris-Dataset-53K", None, {"train": "train", "test": "train"}),
}
# In order of preference: a row may hold a worked solution beside its answer.
QUESTION_FIELDS = ("question", "problem", "prompt", "query", "instruction", "input")
ANSWER_FIELDS = ("answer", "final_answer", "expected_answer", "ground_truth", "target", "label", "solution", "output")


def chain_split(question):
    """"train" or "test" (about one in four), decided by the text alone: no seed can move a problem across."""
    return "test" if hashlib.sha256(question.strip().encode()).digest()[0] < 64 else "train"


def chain_problems(count, split, operands=4, seed=0):
    """`count` different sums of `operands` two-digit numbers, such as Problem("37+48+25+96=", "206").

    The same arguments give the same problems in the same order. Raises InputError for an unknown split and for more
    problems than there is room for.
    """
    check_split(split, ("train", "test"))
    room = 90 ** max(operands, 0) // 8  # half the test quarter of all chains: drawing at random stays quick
    if operands < 1 or not 1 <= count <= room:
        raise InputError(f"cannot make {count} problems with operands={operands}: at least 1 of each, at most {room} problems")
    rng = random.Random(f"chain {split} {operands} {seed}")
    problems = {}
    while len(problems) < count:
        numbers = [rng.randint(10, 99) for _ in range(operands)]
        question = "+".join(map(str, numbers)) + "="
        if chain_split(question) == split:
            problems[question] = Problem(question, str(sum(numbers)))
    return list(problems.values())


def check_split(split, known):
    if split not in known:
        raise InputError(f"unknown split {split!r}: use one of {', '.join(known)}")


def load_problems(source, split, count=None, seed=0, operands=4, question_field=None, answer_field=None):
    """Problems of `split` ("train", "test", or "all" of a data set), as a list of Problem.

    source: "chain"; a short name (SHORT_NAMES); a local .jsonl or .parquet file; or a hub id "owner/name", with
        "owner/name:config" where a data set needs a configuration.
    count: None takes all in order (not for "chain"); a number takes a random sample without replacement, by `seed`.
    operands: terms of a sum, for "chain" only.
    question_field, answer_field: fields of a row; found by name when not given (Body + Question are joined).

    A local file, or a data set published in one split only (math500, aime24, aime25, polaris), is divided by
    chain_split of the question's text, so that train and test never overlap; "all" takes it undivided.
    Raises InputError for whatever is unknown, missing, broken or unreadable, a gold answer included.
    """
    check_split(split, ("train", "test", "all"))
    if source == "chain":
        if count is None:
            raise InputError("the chain problems have no end: give a count")
        return chain_problems(count, split, operands, seed)
    rows, divided = load_rows(source, split)
    if not rows:
        raise InputError(f"{source} is empty: it needs at least one problem")
    problems = [row_problem(row, f"{source}, problem {n}", question_field, answer_field)
                for n, row in enumerate(rows, start=1)]
    if divided and split != "all":
        problems = [problem for problem in problems if chain_split(problem.question) == split]
    if count is None:
        return problems
    if not 1 <= count <= len(problems):
        raise InputError(f"cannot take {count} problems: the {split} split of {source} has {len(problems)}")
    return random.Random(seed).sample(problems, count)


def load_rows(source, split):
    """The rows (a list of dicts) that hold `split`, and whether train and test are still to be divided."""
    if source.endswith(".jsonl"):
        return read_jsonl(Path(source)), True
    if source.endswith(".parquet"):
        if not Path(source).is_file():
            raise InputError(f"no such file: {source}")
        splits, names = load_dataset("parquet", data_files={"all": source}), {}
    elif source in SHORT_NAMES:
        path, config, names = SHORT_NAMES[source]
        splits = load_dataset(path, config)
    elif "/" in source:
        path, _, config = source.partition(":")
        splits, names = load_dataset(path, config or None), {}
    else:
        raise InputError(f"unknown data set {source!r}: use chain, {', '.join(SHORT_NAMES)}, a .jsonl or .parquet "
                         "file, or a hub id owner/name")
    if split == "all":
        return [row for part in splits.values() for row in part], False
    if len(splits) == 1:
        return list(*splits.values()), True
    name = names.get(split, split)
    if name not in splits:
        raise InputError(f"{source} has no split {name!r}: it has {', '.join(splits)}")
    return list(splits[name]), False


def load_dataset(path, config=None, data_files=None):
    from datasets import load_dataset as load  # slow to import, and not needed for chains and .jsonl

    try:
        return load(path, config, data_files=data_files)
    except Exception as error:  # the library raises some twenty kinds, for the network, the name, the config, the file
        reason = str(error).strip().split("\n")[0]
        where = data_files["all"] if data_files else path
        raise InputError(f"could not load the data set {where}: {reason}") from error


def read_jsonl(path):
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: a problem is an object such as {{\"question\": …, \"answer\": …}}")
        rows.append(row)
    return rows


def row_problem(row, where, question_field, answer_field):
    """The Problem in a row; `where` names the row in errors."""
    question = row[find_field(row, where, "question", question_field, QUESTION_FIELDS)]
    answer = row[find_field(row, where, "answer", answer_field, ANSWER_FIELDS)]
    if question_field is None and "Body" in row:
        question = f"{row['Body']} {question}"
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"{where}: the question is not a text: {str(question)[:60]!r}")
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    gold = gold_text(str(answer))
    if not is_correct(gold, gold):
        raise InputError(f"{where}: cannot read the gold answer {str(answer)[-80:]!r} (question: {question[:60]!r})")
    return Problem(question, gold)


def find_field(row, where, kind, named, usual):
    names = {field.lower(): field for field in row}
    if named is not None and named in row:
        return named
    found = [names[name] for name in usual if name in names]
    if named is not None or not found:
        missing = f"field {named!r}" if named is not None else f"{kind} field"
        raise InputError(f"{where}: no {missing}; it has {', '.join(row)} (name one with {kind}_field)")
    return found[0]


def gold_text(text):
    """The answer in a published solution: what follows ####, else the last box, else the whole text."""
    if "####" in text:
        return text.rpartition("####")[2].strip()
    return last_box(text) or text.strip()


# --- Extracting: from a completion to the text of its answer ----------------------------------------------------------

BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?:\{|([^\s{}$]+))")
STATEMENT = re.compile(r"\banswer\s{0,3}\**\s?(?:is|:|=)[\s:*=]{0,10}", re.IGNORECASE)
SENTENCE_END = re.compile(r"\.(?:\s|$)|\s(?:because|since|so|as|which|where)\s|,\s(?=[a-z]{2})")
FORMULA = re.compile(r"\$([^$]+)\$|\\\(.+?\\\)|\\\[.+?\\\]")
NUMBER = re.compile(r"(?:(?<![\w)}])[-−])?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?(?:\\?%)?")


def extract_answer(text):
    """The answer that a completion states, as text, or None.

    In this order: the last balanced \\boxed{…} or \\fbox{…}; the last `#### …`; the last "the answer is …" or
    "Answer: …"; the last formula or number of the last line. Where a text is ambiguous:
    - Text after the box, other statements included, is ignored: the box is the form that prompts ask for.
    - Of two different boxes the last counts: models correct themselves, and as only one is judged nothing is gained
      by boxing several guesses.
    - An unclosed box and all after it is ignored (an earlier box counts, else None): a completion cut off at
      `\\boxed{1` may have been on its way to 12.
    - An empty box is no box: prompts, and completions that repeat them, contain `\\boxed{}`.
    """
    text = text[-10_000:]  # an answer stands at the end, and 100 kB of anything must cost nothing
    box = last_box(text)
    if box is not None:
        return box or None
    marked = re.findall(r"####\s*([-+−$\\(\[{.\d][^\n]*)", text)  # a heading, "#### Step", is no answer
    if marked:
        return marked[-1].strip()
    starts = [match.end() for match in STATEMENT.finditer(text)]
    if starts:
        line = text[starts[-1]:].split("\n")[0][:MAX_LENGTH]
        words = SENTENCE_END.split(line)[0].strip(" *`.")
        candidates = [words, *first(FORMULA, line), *first(NUMBER, line)]
    else:
        line = text.strip().split("\n")[-1][-MAX_LENGTH:]
        words = line.strip(" *`.") if line.strip(" *`.").isalpha() else None
        candidates = [*last(FORMULA, line), line.split("=")[-1], *last(NUMBER, line)]
    return next(filter(is_formula, candidates), words or None)


def first(pattern, line):
    """The first match of a pattern in a list, or an empty list."""
    return [match[0] for match in pattern.finditer(line)][:1]


def last(pattern, line):
    return [match[0] for match in pattern.finditer(line)][-1:]


def last_box(text):
    """Inside of the last whole box, "" if there is none but an unclosed one, None without either."""
    unclosed = None
    for box in reversed(list(BOX.finditer(text))[-20:]):
        depth, end = (0, box.end()) if box[1] else (1, len(text))
        for brace in re.finditer(r"\\.|[{}]", text[box.end():box.end() + 2 * MAX_LENGTH]) if depth else ():
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                end = box.end() + brace.start()
                break
        inside = box[1] or text[box.end():end].strip()
        if inside and depth == 0:
            return inside
        unclosed = "" if depth else unclosed
    return unclosed


def is_formula(text):
    try:
        return operation(read(text)) != "text"
    except InputError:
        return False


# --- Reading: from text to an expression tree -------------------------------------------------------------------------
#
# A tree is a Fraction, the name of a symbol, or a tuple (operation, *arguments). No text can cost much, by construction:
# its length, the depth of nesting, the items to match in any order and the size of exact numbers are limited.

MAX_LENGTH = 500  # characters of an answer
MAX_DEPTH = 24  # brackets, fractions, roots and exponents in one another
MAX_ITEMS = 32  # of a set
MAX_BITS = 2048  # of a numerator or denominator


def invert(table):
    return {name: sign for sign, names in table.items() for name in names.split()}


# LaTeX commands: many spellings of one sign, and commands that only change the looks.
COMMANDS = invert({
    "*": "cdot times ast", "/": "div", ":": "colon", "±": "pm", "∓": "mp", "π": "pi", "∞": "infty", "°": "circ degree",
    "∪": "cup", "∈": "in", "≤": "le leq leqslant", "≥": "ge geq geqslant", "<": "lt", ">": "gt", "=": "approx", "%": "%",
    "|": "vert lvert rvert mid", r"\{": "lbrace", r"\}": "rbrace", "⟨": "langle", "⟩": "rangle", "↵": "\\",
    r"\frac": "dfrac tfrac cfrac", r"\binom": "dbinom tbinom",
    " ": "left right big Big bigl bigr Bigl Bigr displaystyle textstyle limits quad qquad mathbb mathbf mathcal mathit "
         "boldsymbol bf rm boxed fbox , ! ; : > $ #"}) | {" ": " "}
WORDS = invert({"π": "pi", "∞": "infinity inf", "°": "degrees degree", "%": "percent", ",": "or and", "∪": "union",
                "√": "sqrt", r"\arcsin": "asin", r"\arccos": "acos", r"\arctan": "atan"})
CHARACTERS = str.maketrans("−–×·⋅∙∗÷∕⁄º≈", "--*****///°=", "€£")
# Short words that are not a product of variables.
UNITS = set("cm mm km in ft yd mi kg mg lb lbs oz ml hr min sec cent deg mph no".split())
GREEK = set("alpha beta gamma delta epsilon varepsilon zeta eta theta lambda mu nu xi rho sigma tau phi varphi chi psi "
            "omega ell Gamma Delta Theta Lambda Sigma Phi Psi Omega".split())
FUNCTIONS = {
    r"\sin": cmath.sin, r"\cos": cmath.cos, r"\tan": cmath.tan, r"\cot": lambda z: 1 / cmath.tan(z),
    r"\sec": lambda z: 1 / cmath.cos(z), r"\csc": lambda z: 1 / cmath.sin(z), r"\arcsin": cmath.asin,
    r"\arccos": cmath.acos, r"\arctan": cmath.atan, r"\sinh": cmath.sinh, r"\cosh": cmath.cosh, r"\tanh": cmath.tanh,
    r"\exp": cmath.exp, r"\ln": cmath.log, r"\log": cmath.log10}  # log without a base is decimal, as in school
TOKEN = re.compile(r'((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|("[^"]*")|(\\?[A-Za-z]+)|(\*\*|<=|>=|\\[{}]|\S)')


def clean(text):
    """The text with LaTeX's and Unicode's variants in one spelling, and the words of \\text{…} in double quotes."""
    if not text.isascii():
        text = re.sub("[⁰¹²³⁴-⁹⁻]+", lambda power: "^{" + power[0] + "}", text.translate(CHARACTERS))
        text = re.sub("[¼-¾⅐-⅞]", lambda part: r"\frac{%s}{%s}" % tuple(unicodedata.normalize("NFKC", part[0]).split("⁄")), text)
        text = unicodedata.normalize("NFKC", text)
        text = "".join(str(unicodedata.decimal(c, c)) for c in text if unicodedata.category(c) not in ("Cf", "Mn"))
    text = re.sub(r"[\x00-\x20\x7f\"$`]+", " ", text.replace(r"\$", "")).rstrip(" *.,;:").lstrip(" *=:")
    text = re.sub(r"(?<=\d)(?:\\!)?(?:,\\!|\{,\}|\\,)\s*(?=\d{3}(?!\d))", "", text)
    if not re.search(r"[(\[]|\\\{", text):  # a comma before three digits separates thousands, but (100,200) is a point
        text = re.sub(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?!\d)", lambda number: number[0].replace(",", ""), text)
    text = re.sub(r"\\(?:text|mbox|textbf|textit|textrm|mathrm|operatorname)\s*\{([^{}]*)\}", quote, text)
    text = re.sub(r"\\begin\s*\{(?:[a-z]*matrix\}|array\}\s*\{[^{}]*\})", "⟦", text)
    text = re.sub(r"\\end\s*\{(?:[a-z]*matrix|array)\}", "⟧", text)
    text = re.sub(r"\\([A-Za-z]+|[^{}])", lambda command: COMMANDS.get(command[1], command[0]) + " ", text)
    text = re.sub(r"\^\s*(?:°|\{\s*°\s*\})", "°", text)
    return re.sub(r"^\s*([A-Za-z])\s*\(\s*[a-z]\s*\)\s*=", r"\1=", text).strip()  # f(x) = … names its value f


def quote(command):
    words = command[1].strip().replace("\\", "")
    formula = words in WORDS or "\\" + words in FUNCTIONS or (command[0].startswith(r"\mathrm") and len(words) == 1)
    return f" {words} " if formula else f' "{words}" '


def tokens(text):
    """Strings, each of a kind that its first character tells: a number, a letter, a "word", a \\command, or a sign."""
    found = []
    for number, words, name, sign in TOKEN.findall(text):
        bare = name.lstrip("\\")
        if not name:
            found.append(number.rstrip('.') or words or {"**": "^", "<=": "≤", ">=": "≥", ";": ","}.get(sign, sign))
        elif name in WORDS:
            found.append(WORDS[name])
        elif "\\" + bare in FUNCTIONS:
            found.append("\\" + bare)
        elif name != bare:
            found.append(bare if bare in GREEK else name)
        # Letters in alphabetical order are a product, as products are written: xyz, abc. Others are a word: even, apples.
        elif name in UNITS or (len(name) > 2 and list(name) != sorted(set(name))):
            found.append(f'"{name}"')
        else:
            found += name
    return found


CLOSING = {"(": ")]", "[": ")]", "{": "}", r"\{": [r"\}"], "⟨": "⟩"}
MINUS_INFINITY = ("*", Fraction(-1), "∞")


class Reader:
    """Recursive descent over the tokens of an answer; ± stands for `sign`, 1 or −1. Raises ValueError."""

    def __init__(self, found, sign):
        self.tokens, self.at, self.depth, self.bars = [*found, ""], 0, 0, 0
        self.signs = {"+": 1, "-": -1, "±": sign, "∓": -sign}

    def take(self, wanted=None):
        """The next token, moving past it, if it is among those wanted (None: any); else ""."""
        token = self.tokens[self.at]
        if token == "" or (wanted is not None and token not in wanted):
            return ""
        self.at += 1
        return token

    def expect(self, wanted):
        if not self.take(wanted):
            raise ValueError(f"unexpected {self.tokens[self.at] or 'end'!r}")

    def answer(self):
        items = self.items()
        if self.tokens[self.at]:
            raise ValueError(f"unexpected {self.tokens[self.at]!r}")
        return unordered(items)

    def items(self):
        items = [self.item()]
        while self.take(",∪"):
            while self.take(","):  # "1, 2, and 3"
                pass
            items.append(self.item())
        return items

    def item(self):
        """A formula, or a statement about one: Area = 5, x = 5, x ∈ [1, 2], 1 < x ≤ 2."""
        label = self.take() if self.tokens[self.at].startswith('"') else ""
        choice = re.fullmatch(r'"\(?([A-Za-z])[).]*"', label)
        if choice and self.tokens[self.at] in ("", ",", "}", ")"):
            return choice[1]
        if label and not choice:  # of "(C) 12" the 12 counts
            self.expect("=:")
        sides, signs = [self.formula()], []
        while sign := self.take("=<>≤≥∈"):
            signs.append(sign)
            sides.append(self.formula())
        return statement(sides, signs) if signs else sides[0]

    def formula(self, level=1):
        """A formula of sums (level 1), of products (2), of products without a sign (3), a power (4)."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
        sign = 1
        while level < 5 and (token := self.take("+-±∓")):
            sign *= self.signs[token]
        node = self.atom()
        for sign_after in "!°%" if level < 5 else "":
            if self.take(sign_after):
                node = (sign_after, node)
        if level < 5 and self.take("^"):
            node = ("^", node, self.formula(4))
        node = node if sign == 1 else negative(node)
        while True:
            if level <= 1 and self.tokens[self.at] in self.signs:
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
            self.take()
            if self.take("/"):
                self.take()
            if self.take("^"):
                self.argument()
        self.depth -= 1
        return node

    def multiplies(self):
        """Whether the next token begins a factor: 2x, 3(4), 5√2, but not 2 3."""
        token, before = self.tokens[self.at], self.tokens[self.at - 1]
        if token[:1].isdigit() and before[:1].isdigit():
            raise ValueError("two numbers side by side")
        return token[:1].isalnum() or token in CLOSING or token in ("∞", "√") or (token == "|" and not self.bars) \
            or (token[:1] == "\\" and token != r"\}")

    def atom(self):
        token = self.take()
        if token[-1:].isdigit():
            return self.number(token)
        if token in CLOSING:
            return self.bracket(token)
        if token == "|":
            self.bars += 1
            node = ("|", self.formula())
            self.expect("|")
            self.bars -= 1
            return node
        if token == "⟦":
            rows = [[self.item()]]
            while not self.take("⟧"):
                if self.take("&"):
                    rows[-1].append(self.item())
                else:
                    self.expect("↵")
                    if self.tokens[self.at] != "⟧":
                        rows.append([self.item()])
            return ("matrix", *(("row", *row) for row in rows))
        if token == r"\frac":
            return quotient(self.argument(), self.argument())
        if token == r"\binom":
            return (r"\binom", self.argument(), self.argument())
        if token == r"\sqrt":
            degree = self.bracket("[") if self.take("[") else Fraction(2)
            return ("^", self.argument(), quotient(Fraction(1), degree))
        if token == "√":
            return ("^", self.formula(5), Fraction(1, 2))
        if token in FUNCTIONS:
            return self.function(token)
        if token == "∞" or token.isalpha():
            return token + self.subscript()
        raise ValueError(f"unexpected {token or 'end'!r}")

    def argument(self):
        """Of \\frac and the like: a group or, as in LaTeX, a single digit: \\frac43."""
        token = self.tokens[self.at]
        if token.isdigit():
            self.tokens[self.at:self.at + 1] = [token[1:]] if token[1:] else []
            return Fraction(token[0])
        return self.formula(5)

    def number(self, token):
        if len(token.lower().partition("e")[2]) > 5:
            raise ValueError("too large")
        value = Fraction(token)
        if "." in token[:-1] and "e" not in token.lower():
            return ("decimal", value, Fraction(1, 10 ** len(token.partition(".")[2])))
        if self.take("_"):
            return ("base", value, self.argument())
        if token.isdigit() and self.take([r"\frac"]):  # a mixed number, where the fraction is proper
            part = quotient(self.argument(), self.argument())
            return value + part if isinstance(part, Fraction) and 0 < part < 1 else ("*", value, part)
        top, slash, bottom = [*self.tokens, "", ""][self.at:self.at + 3]
        if token.isdigit() and top.isdigit() and slash == "/" and bottom.isdigit() and int(top) < int(bottom):
            self.at += 3
            return value + Fraction(int(top), int(bottom))
        return value

    def subscript(self):
        start = self.at
        if self.take("_") and self.take() == "{":
            while self.take() not in ("}", ""):
                pass
        return "".join(self.tokens[start:self.at]).replace("{", "").replace("}", "")

    def bracket(self, opening):
        bars, self.bars = self.bars, 0
        items, self.bars = self.items(), bars
        closing = self.tokens[self.at]
        self.expect(CLOSING[opening])
        if opening in ("{", r"\{"):
            return unordered(items)
        return items[0] if len(items) == 1 and opening + closing in ("()", "[]") else (opening + closing, *items)

    def function(self, name):
        base = self.argument() if name == r"\log" and self.take("_") else None
        exponent = self.argument() if self.take("^") else None
        if exponent == -1 and name[1:] in ("sin", "cos", "tan"):
            name, exponent = r"\arc" + name[1:], None
        argument = self.formula(5 if self.tokens[self.at] in ("(", "[") else 3)
        if operation(argument) == "°":
            argument = ("*", argument[1], "π", Fraction(1, 180))
        node = (name, argument) if base is None else ("*", (r"\ln", argument), ("/", (r"\ln", base)))
        return node if exponent is None else ("^", node, exponent)


def operation(node):
    return node[0] if isinstance(node, tuple) else None


def join(sign, left, right):
    """A sum or product with one more term: flat, so that its depth does not grow with its length."""
    return (sign, *(left[1:] if operation(left) == sign else [left]), right)


def negative(node):
    if operation(node) == "decimal":
        return ("decimal", -node[1], node[2])
    return -node if isinstance(node, Fraction) else ("*", Fraction(-1), node)


def quotient(top, bottom):
    exact = isinstance(top, Fraction) and isinstance(bottom, Fraction) and bottom != 0
    return top / bottom if exact else ("*", top, ("/", bottom))


def unordered(items):
    if len(items) == 1:
        return items[0]
    if len(items) > MAX_ITEMS or any(operation(part) == "set" for item in items for part in parts(item)):
        raise ValueError("too many items, or sets of sets")
    return ("set", *items)


def statement(sides, signs):
    """What a chain of relations says: a formula, ("=", name, value), an equation ("=", left, right), or an interval."""
    if signs == ["∈"]:
        return sides[1]
    if set(signs) == {"="}:
        named = sides[0] in variables(sides[0])
        if all(same(side, sides[-1]) for side in sides[named:]):  # 37+48 = 85 says 85
            return ("=", sides[0], sides[-1]) if named else sides[-1]
        if len(sides) == 2 and variables(("=", *sides)):
            return ("=", *sides)
    elif set(signs) <= set(">≥"):
        return statement(sides[::-1], ["<≤"[sign == "≥"] for sign in signs[::-1]])
    elif set(signs) <= set("<≤") and len(sides) == 2:
        right = sides[1] in variables(sides[1])
        return statement([*sides, "∞"], [*signs, "<"]) if right else statement([MINUS_INFINITY, *sides], ["<", *signs])
    elif set(signs) <= set("<≤") and sides[1] in variables(sides[1]) and len(sides) == 3:
        return ("(["[signs[0] == "≤"] + ")]"[signs[1] == "≤"], sides[0], sides[2])
    raise ValueError("a false equation, or an inequality that is no interval")


def parts(node):
    """The node and all within it."""
    yield node
    if isinstance(node, tuple):
        for argument in node[1:]:
            yield from parts(argument)


def variables(node):
    return {part for part in parts(node) if isinstance(part, str) and part not in CONSTANTS}


@lru_cache(maxsize=4096)
def read(text):
    """The expression tree of an answer. What is no formula but has a word in it is ("text", words).

    Raises InputError for what has no value: too long, deep or large, unbalanced, undefined as 1/0, or mere signs.
    """
    if len(text) > MAX_LENGTH:
        raise InputError(f"longer than {MAX_LENGTH} characters")
    cleaned = clean(text)
    try:
        found = tokens(cleaned)
        node = Reader(found, 1).answer()
        if "±" in cleaned or "∓" in cleaned:
            items = []
            for item in [*members(node), *members(Reader(found, -1).answer())]:
                items += [] if any(same(item, other) for other in items) else [item]
            node = unordered(items)
        if same(node, node):  # false for what is undefined
            return node
        raise ValueError("undefined")
    except (ValueError, ArithmeticError) as error:
        word = re.search(r"(?<![\\A-Za-z])[A-Za-z]{2}", cleaned)
        if word and all(cleaned.count(a) == cleaned.count(b) for a, b in ("()", "{}")):
            return ("text", as_words(cleaned))
        raise InputError(str(error)) from None


def members(node):
    return node[1:] if operation(node) == "set" else (node,)


def as_words(cleaned):
    return re.sub(r"[\s\"{}]", "", cleaned).lower()


# --- Judging: equality of meaning -------------------------------------------------------------------------------------


CONSTANTS = {"π": math.pi, "e": math.e, "i": 1j, "∞": math.inf}
STRUCTURES = ("set", "=", "text", "matrix", "row", "()", "[]", "(]", "[)", "⟨⟩")  # the rest evaluates to a number


@lru_cache(maxsize=4096)
def sample(name, point):
    """A variable's value at one of four fixed random points: integers at 0 and 1, complex numbers at 2 and 3.

    The complex numbers lie near 1, where √(ab) = √a√b and log(ab) = log a + log b hold as they do for positive numbers,
    and yet |x| is not x.
    """
    rng = random.Random(f"{name} {point}")
    if point < 2:
        return Fraction(rng.randint(100, 999) * (1, -1)[point])
    return cmath.rect(rng.uniform(0.9, 1.1), rng.uniform(0.2, 0.5) * rng.choice((1, -1)))


def evaluate(node, point):
    """Value of a formula at a point: a Fraction where it is rational, else complex or float; ValueError, ArithmeticError."""
    if isinstance(node, Fraction):
        return node
    if isinstance(node, str):
        return CONSTANTS[node] if node in CONSTANTS else sample(node, point)
    if node == MINUS_INFINITY:
        return -math.inf
    if node[0] in STRUCTURES:
        raise ValueError("a list or a statement within a formula")
    x, *more = [evaluate(argument, point) for argument in node[1:]]
    if node[0] not in ("+", "*"):
        return bounded(OPERATIONS[node[0]](x, *more))
    for y in more:
        x = bounded(x + y if node[0] == "+" else x * y)
    return x


def bounded(x):
    if isinstance(x, Fraction):
        if max(x.numerator.bit_length(), x.denominator.bit_length()) > MAX_BITS:
            raise OverflowError("too large")
    elif not cmath.isfinite(x):
        raise ValueError("undefined")
    return x


def power(x, y):
    """x^y, exact where it is rational; the real root for an odd root of a negative number."""
    if not (isinstance(x, Fraction) and isinstance(y, Fraction)) or (x < 0 and y.denominator % 2 == 0):
        return complex(x) ** complex(y)
    if y.denominator == 1:
        if (max(abs(x.numerator), x.denominator).bit_length() - 1) * abs(y) > MAX_BITS:
            raise OverflowError("too large")
        return x ** int(y)
    sign, n = (-1 if x < 0 else 1), y.denominator
    top, bottom = [math.isqrt(v) if n == 2 else round(v ** (1 / n)) for v in (abs(x.numerator), x.denominator)]
    if (top ** n, bottom ** n) == (abs(x.numerator), x.denominator):
        return power(Fraction(sign * top, bottom), Fraction(y.numerator))
    return (sign * float(abs(x)) ** (1 / n)) ** y.numerator


def natural(x, limit):
    if not isinstance(x, Fraction) or x.denominator != 1 or not 0 <= x <= limit:
        raise ValueError("not a natural number, or too large")
    return int(x)


OPERATIONS = FUNCTIONS | {
    "/": lambda x: 1 / x, "^": power, "|": abs, "%": lambda x: x / 100, "°": lambda x: x,
    "!": lambda x: Fraction(math.factorial(natural(x, 300))),
    r"\binom": lambda n, k: Fraction(math.comb(natural(n, 1000), natural(k, 1000))),
    "decimal": lambda value, unit: value, "base": lambda digits, base: digits}


def close(x, y):
    """Rational numbers must be identical, others may differ by the rounding of doubles: 1e-11, relative."""
    if x == y or math.inf in (x, y) or -math.inf in (x, y) or (isinstance(x, Fraction) and isinstance(y, Fraction)):
        return x == y
    return abs(complex(x) - complex(y)) <= 1e-11 * max(abs(complex(x)), abs(complex(y)), 1e-4)


def equal(a, b):
    """Whether two formulas have the same value everywhere, and three licences of school mathematics.

    Values are exact at two integer points where both sides are rational there, else double precision at two complex points.
    - A decimal of six or more significant digits equals what differs from it by less than one unit of its last place:
      0.333333 = 1/3. An integer is never that near without being equal, nor another decimal with as many places.
    - p% equals p/100 and also, where p > 1, a bare p ("what percentage …?"). A bare p ≤ 1 is rather a fraction.
    - 52_8 equals a bare 52, and not its value 42: else a task of conversion would have its question for an answer.
    """
    for one, other in ((a, b), (b, a)):
        if operation(one) == "base":
            return one[1:] == other[1:] if operation(other) == "base" else equal(one[1], other)
        if operation(one) == "%" != operation(other) and equal(one[1], other) and abs(evaluate(other, 0)) > 1:
            return True
        if operation(one) == "decimal" and abs(one[1]) >= 10 ** 5 * one[2] and abs(evaluate(other, 0) - one[1]) < one[2]:
            return True
    try:
        exact = [(evaluate(a, point), evaluate(b, point)) for point in (0, 1)]
        if all(isinstance(value, Fraction) for pair in exact for value in pair):
            return all(x == y for x, y in exact)
    except (ValueError, ArithmeticError):
        pass  # too large at an integer, or undefined for a negative number
    return all(close(evaluate(a, point), evaluate(b, point)) for point in (2, 3))


def same(a, b):
    """Whether two trees mean the same. A name is optional: x = 5 and 5 are the same, x = 5 and y = 5 are not."""
    if operation(a) == operation(b) == "=":
        return same(a[2], b[2]) if a[1] == b[1] else proportional(a, b)
    if "=" in (operation(a), operation(b)):
        named, other = (a, b) if operation(a) == "=" else (b, a)
        return isinstance(named[1], str) and same(named[2], other)
    structures = [operation(node) if operation(node) in STRUCTURES else "" for node in (a, b)]
    if structures == ["", ""]:
        return equal(a, b)
    if structures[0] != structures[1] or structures[0] == "text" or len(a) != len(b):
        return a == b
    if structures[0] != "set":
        return all(map(same, a[1:], b[1:]))
    rest = list(b[1:])
    for item in a[1:]:
        match = next((index for index, other in enumerate(rest) if same(item, other)), None)
        if match is None:
            return False
        del rest[match]
    return True


def proportional(a, b):
    """Whether two equations are multiples of each other, as 2x = 10 and x = 5."""
    (a2, a3), (b2, b3) = [[evaluate(left, p) - evaluate(right, p) for p in (2, 3)] for _, left, right in (a, b)]
    return a2 != 0 != b2 and close(a2 * b3, a3 * b2)


def is_correct(prediction, gold):
    """Whether an extracted answer (or None) means the same as the gold answer; False if either cannot be read."""
    try:
        a, b = read(prediction or ""), read(gold)
        return same(a, b) or ("text" in (operation(a), operation(b)) and as_words(clean(prediction)) == as_words(clean(gold)))
    except (ValueError, ArithmeticError):
        return False


def reward(completion, gold):
    """1.0 if the answer in the completion's text is right, else 0.0: also where there is none or it can't be read."""
    return float(is_correct(extract_answer(completion), gold))


# --- Advantages -------------------------------------------------------------------------------------------------------


def group_advantages(rewards, groups, kind="std"):
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


def main(arguments):
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


def show(node):
    return f"{node[0]}({', '.join(map(show, node[1:]))})" if isinstance(node, tuple) else str(node)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"rewards.py: {error}")
