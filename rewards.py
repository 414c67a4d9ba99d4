"""Problems and verdicts: load problems, extract an answer, judge it, and turn rewards into group advantages.

    problems = load_problems("gsm8k", "train", count=256)
    r = reward(completion_text, problems[0].answer)                    # 1.0 or 0.0
    advantages = group_advantages(rewards, groups)                     # [B]
"""
import hashlib
import json
import random
import re
from dataclasses import dataclass
from fractions import Fraction
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


# --- Verdicts ---------------------------------------------------------------------------------------------------------


def last_box(text):
    """Inside of the last balanced \\boxed{}, or None."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*", text))):
        depth = 0
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[match.end():end + 1].strip("{}").strip()
    return None


NUMBER = r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?"


def extract_answer(text):
    """The answer that a completion states, or None."""
    box = last_box(text)
    if box is not None:
        return box
    stated = re.findall(r"(?:####|answer is:?|Answer:)\s*([^\n]*)", text)
    numbers = re.findall(NUMBER, stated[-1]) if stated else []
    if numbers:
        return numbers[0]
    lines = [line for line in text.splitlines() if line.strip()]
    numbers = re.findall(NUMBER, lines[-1]) if lines else []
    return numbers[-1] if numbers else None


def simple_value(text):
    text = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text)
    text = re.sub(r"[\s$,]|\\!|\.$", "", text)
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return text


def is_correct(prediction, gold):
    """Whether an extracted answer means the same as the gold answer."""
    if not prediction or not gold or max(len(prediction), len(gold)) > 500:
        return False
    return simple_value(prediction) == simple_value(gold)


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
