"""Problems, verdicts and advantages. Most tests are tables: one row a case, with the reason in the row."""
import json
import math
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import rewards
from rewards import InputError, Problem, chain_problems, split_of, group_advantages, is_correct, load_problems

# --- Extracting -------------------------------------------------------------------------------------------------------
EXTRACTED = [
    (r"so $x = \boxed{7}$.", "7", "a box"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", "braces within"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}", "escaped braces within"), (r"\boxed 7$", "7", "a box without braces"),
    (r"\boxed{\text{if } x \le \}", None, "an escaped brace does not close the box"),
    (r"\fbox{7}", "7", "the other box"), (r"\boxed{\boxed{7}}", "7", "a box in a box"),
    (r"\boxed{7} or rather \boxed{8}", "8", "of two boxes the last: a correction"),
    (r"\boxed{7} The answer is 8.", "7", "text after the box is ignored"), ("3 + 4 = <<3+4=7>>7\n#### 7", "7", "GSM8K"),
    (r"The answer is 8, I mean \boxed{7}", "7", "a box beats other statements"), ("The answer is: **7**", "7", "bold"),
    ("#### 8\n\\boxed{7}", "7", "a box beats ####, before or after it"),
    (r"so it is \boxed{1", None, "an unclosed box may be half a number"),
    (r"\boxed{7} hence \boxed{1", "7", "an earlier whole box counts"), ("**Answer:** `7`", "7", "bold and code ticks"),
    (r"Put it in \boxed{}. The answer is 7.", "7", "an empty box is an echo of the prompt"),
    ("#### $1,234", "$1,234", "GSM8K with currency and a comma"), ("Answer:\n\n42", "42", "on a line of its own"),
    ("#### Step 2\nThe answer is 7.", "7", "a heading is no answer"),
    ("The answer is 7.", "7", "a full stop is not part of it"), ("The answer is 3.5.", "3.5", "but a decimal point is"),
    ("Final Answer: The final answer is $7$. I hope it is correct.", "$7$", "the few-shot phrase of MATH"),
    ("The answer is 7 because 14/2 = 7.", "7", "the reason is not part of it"),
    (r"The answer is \(\frac12\), which is small.", r"\(\frac12\)", "inline LaTeX"),
    ("The answer is 7 dollars and not 8", "7 dollars", "what it is not is no part of it"),
    ("The answer is not 204 but 205", "205", "nor what it is instead of"), ("the answer is even", "even", "a word"),
    ("Final Answer: The largest $n$ is 34.", "34", "nor what it is the answer to"),
    ("The answer is 3, 5, and 7.", "3, 5, and 7", "a list is taken whole"), ("I do not know", None, "no answer"),
    ("The answer is 5 or 7", "5 or 7", "and so are two guesses"), ("It is 3 or so", None, "nor a part of a line"),
    ("The answer is at least 5", "at least 5", "and words before it"), ("37+48=85;85+25=110", "110", "a chain of sums"),
    ("The answer is 5!", "5", "the end of a sentence is no factorial"), ("", None, "nothing"),
    ("The answer is 24 by symmetry.", "24", "another reason"), ("It costs $12.50 in all", "$12.50 in all", "currency"),
    ("The answer is:\n\\[\n42\n\\]", r"\[ 42 \]", "display maths on lines of its own"),
    ("We find that x is not 3.", None, "what is denied is no answer"),
    ("Then x = 5\nSo there are 12 apples.", "12 apples", "end of the last line"),
    (r"We get $x = \frac{3}{4}$.", r"$x = \frac{3}{4}$", "last formula of the last line"),
    ("about 3/4 of them", "3/4 of them", "a fraction"), ("She has 3. So it makes 12.", "12", "the last sentence"),
    ("She had 12 eggs and sold 4, so 8 are left.", "8 are left", "a conclusion, not what it is drawn from"),
    ("4 rows of 5 are, therefore, 20 seats", "20 seats", "nor where a word says it alone"),
    ("The answer is 7, so we are done.", "7", "what follows from an answer is no part of it"),
    ("The answer is 8, which is wrong.", "8, which is wrong", "what is taken back is not said"),
    ("So she has 129 errors so far", "129 errors so far", "a so that draws no conclusion"),
    ("It is a factor of 8", None, "a relation to a number"), ("It doubles every 8", None, "another"),
]


@pytest.mark.parametrize("text, answer, reason", EXTRACTED, ids=[row[2] for row in EXTRACTED])
def test_extract_answer(text, answer, reason):
    assert rewards.extract_answer(text) == answer


# --- Judging ----------------------------------------------------------------------------------------------------------
RIGHT = [
    ("42", "42.0", "a whole decimal"), ("025", "25", "leading zeros, as AIME writes"), ("−7", "-7", "Unicode minus"),
    ("+7", "7", "a sign that says nothing"), ("٣", "3", "Unicode digits"), ("７", "7", "full-width digits"),
    ("1,234", "1234", "thousands"), (r"10,\!080", "10080", "thousands in LaTeX"), (r"\$32,\!348", "32348", "currency"),
    ("2{,}125", "2125", "thousands in braces"), ("$18.90", "18.9", "currency and a trailing zero"),
    ("€5", "5", "another currency"), ("0.5", r"\frac{1}{2}", "decimal and fraction"), ("20 percent", "1/5", "in words"),
    (r"\frac12", "1/2", "LaTeX takes one digit"), (r"\frac9{19}", "9/19", "mixed braces"),
    (r"\dfrac{3}{4}", r"\tfrac{6}{8}", "reduced or not"), (r"-\frac{1}{2}", r"\frac{-1}{2}", "where the sign stands"),
    ("1 4/5", "9/5", "a mixed number"), (r"137 \frac{1}{2}", "137.5", "a mixed number in LaTeX"),
    ("½", "0.5", "a Unicode fraction"), ("0.333333", "1/3", "six digits of a decimal"), (r"90^\circ", "90", "degrees"),
    ("1.41421", r"\sqrt2", "six digits of a root"), (".0000672", r"6.72 \times 10^{-5}", "scientific notation"),
    ("6.72e-5", "0.0000672", "scientific notation of programs"), ("20%", "20", "a percentage asked for"),
    (r"20\%", "0.2", "a percentage is a fraction"), ("90°", r"90^{\circ}", "Unicode degrees"),
    (r"\sin 30^\circ", "1/2", "degrees in a sine"), (r"15\mbox{ cm}^2", "15", "a unit with an exponent"),
    ("5 km/h", r"5\text{ km/h}", "a quotient of units"), ("20 miles per hour", "20", "a unit in words"),
    (r"5.4~\text{ cents}", "5.4", "a unit in LaTeX"), (r"11\sqrt2", r"\sqrt{242}", "a root drawn out"),
    (r"\sqrt[3]{-8}", "-2", "a real odd root"), ("2√3", r"\sqrt{12}", "Unicode root"), ("2^{10}", "1024", "a power"),
    (r"\frac{\sqrt{3}}{3}", r"1/\sqrt{3}", "a rationalised denominator"), ("x²", "x^2", "Unicode exponent"),
    ("sqrt(13)*3", r"3\sqrt{13}", "a root in plain text"), ("2**10", "2^10", "a power as programs write it"),
    ("2π", r"2\pi", "Unicode pi"), ("2*pi", r"2\pi", "pi in words"), ("5!", "120", "a factorial"),
    (r"\binom{5}{2}", "10", "a binomial"), ("6+9i", "9i+6", "a complex number"), (r"e^{i\pi}", "-1", "Euler"),
    (r"\log_2 8", "3", "a logarithm"), (r"\ln e^2", "2", "a natural one"), (r"\sin^2 x + \cos^2 x", "1", "an identity"),
    (r"\cot x", r"\frac{\cos x}{\sin x}", "a quotient of functions"), ("(3,4]", r"\left( 3, 4 \right]", "an interval"),
    ("x>2", r"(2,\infty)", "an inequality is an interval"), (r"x \in [-2,7]", r"-2 \le x \le 7", "so is a double one"),
    (r"(0,9) \cup (9,36)", r"(9,36)\cup(0,9)", "a union in any order"), ("3,5,7", "7, 5, and 3", "a list in any order"),
    (r"\{1,2\}", "{2, 1}", "a set in any order"), (r"1 \pm \sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}", "plus or minus"),
    (r"x = \pm 5", "x = 5 or x = -5", "plus or minus, named"), ("x=5", "5", "a name is optional"),
    (r"\{1\pm\sqrt{5},-2\}", r"-2, 1+\sqrt5, 1-\sqrt5", "plus or minus in a set"), ("2k+2", "2(k+1)", "factored"),
    ("f(x) = 2x+1", "2x+1", "also a function's"), (r"\text{Area} = 5", "5", "also in words"), ("(C)", "C", "a choice"),
    ("37+48 = 85", "85", "a true sum says its value"), ("2x = 10", "x = 5", "multiples of an equation"),
    ("y = 2x+3", "2x - y + 3 = 0", "a line in two forms"), (r"\langle 1, 2 \rangle", "⟨1,2⟩", "a vector"),
    ("5x - 7y + 11z + 4 = 0", "-10x+14y = 22z+8", "a plane in two forms"), ("(x-1)(x+1)", "x^2-1", "a polynomial"),
    (r"\begin{pmatrix} -1/3 \\ 2 \end{pmatrix}", r"\begin{bmatrix}-\frac13\\2\\\end{bmatrix}", "a matrix"),
    ("(1-x)^{20}", "(x-1)^20", "a high power"), (r"\frac{11+9a}{20}", "0.55+0.45a", "decimal coefficients"),
    ("|x-1|", "|1-x|", "absolute value"), (r"\text{(C)}", "C", "a choice in LaTeX"), (r"\text{even}", "even", "a word"),
    ("Navin", r"\text{navin}", "a name in any case"),
    ("No solution", "no solution.", "words"), ("52", "52_8", "the base may go unsaid"), ("**7**", "7", "bold left on"),
    (r"\text{below}", "below", "a word in alphabetical order is still that word"), (r"\boxed{7}", "7", "a box left on"),
    ("4210_5", "4210_{5}", "a base in braces"), ("2^{2024}", "4^{1012}", "a large power, exactly"),
    ("x_1+x_2", "x_{2}+x_{1}", "subscripts"), ("3:4", "3/4", "a ratio"), ("2:4:6", "1:2:3", "a ratio of three"),
    ("3^{2007}", "3^{2006}*3", "a huge power"), ("20 mph", "20 miles per hour", "a unit in short"),
    ("864 square inches", r"864\mbox{ inches}^2", "or in long"), ("9", "9 (apples)", "ASDiv"),
    ("12:30 pm", "12:30", "a time"), ("1_000", "1000", "thousands of programs"), ("68°F", "68", "a temperature"),
    (r"\angle ABC = 30^\circ", "30", "an angle"), ("Rs.168", "168", "rupees"),
    ("R(R+1)", "R^2+R", "a letter that stands alone, too, is a factor"), ("a circle", r"\text{circle}", "an article"),
    (r"x = \sqrt{2} \approx 1.41", r"\sqrt2", "a value and its decimal"), ("2xy+1", "1+2y*x", "letters side by side"),
]


@pytest.mark.parametrize("a, b, reason", RIGHT, ids=[row[2] for row in RIGHT])
def test_equal_in_meaning(a, b, reason):
    assert is_correct(a, b) and is_correct(b, a)
    assert is_correct(a, a) and is_correct(b, b)


WRONG = [
    ("204", "205", "integers are exact"), ("204.00001", "204", "no tolerance swallows an integer"),
    ("7", "-7", "a sign"), ("1234567.5", "1234566.5", "no relative tolerance"), ("3/56", "56/3", "upside down"),
    ("0.33", "1/3", "two digits are no third"), ("0.666665", "2/3", "a wrong last digit"),
    ("1,234", "1.234", "comma and point"), ("0.5%", "0.5", "half a percent is no half"), ("(3,4]", "(3,4)", "one end"),
    (r"3\sqrt{13}", r"3\sqrt{14}", "a digit under the root"), ("(2,4)", "[2,4]", "open and closed ends"),
    ("123456789012x", "123456789013x", "coefficients are exact"), ("(2,4)", "(4,2)", "order in a point"),
    (r"(-\infty, 3)", r"(\infty, 3)", "the sign of infinity"), ("1,2", "(1,2)", "a list is no point"),
    (r"(-\infty, 2)", r"(-\infty, 3)", "the finite end beside an infinite"), ("3,5,7", "3,5,8", "one element"),
    ("(100,200)", "(100200)", "a point is no number with thousands"), ("1,2", "1", "one of two solutions"),
    ("1,1,2", "1,2,2", "how often"), ("1,2,3", "2", "a shotgun list"), ("5 or 7", "5", "two guesses"),
    (r"5\text{ or 7}", "5", "a guess hidden in a unit"), ("52_8", "52_9", "another base"), ("xyz", "xy", "a factor"),
    ("52_8", "42", "the value of the digits is the question of a conversion task"), ("x=5", "y=5", "another name"),
    ("2x=10", "2x=12", "another equation"), ("7 = 8", "8", "a false equation"), ("|x|", "x", "absolute value"),
    (r"15\text{ cm}^3", r"15\mbox{ cm}^2", "an area is no volume"), ("x+1", "x-1", "a sign in a formula"),
    (r"\sqrt{123456789}", r"\sqrt{123456790}", "a digit that moves the value by 4e-9"), ("C", "D", "another choice"),
    ("2R", "2r", "case of a variable"), ("6-5i", "6+5i", "the conjugate"), ("east", "seat", "words are not products"),
    (r"\text{even}", "odd", "another word"), ("x>2", r"x \ge 2", "strict or not"), ("", "7", "nothing"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}", "a column is no row"),
    (r"\log 2", r"\ln 2", "the base of a logarithm"), (r"\sin x", r"\cos x", "another function"), ("???", "7", "signs"),
    (r"1\frac{4}{5}", "4/5", "the whole part"), (None, "7", "no answer"), ("1/0", "1/0", "undefined"),
    ("9**9**9", "1", "too large"), ("__import__('os').system('true')", "0", "text is never executed"),
    (r"\frac{1}{", "1", "unbalanced"), ("(1", "1", "unclosed"), ("x^2+y^2=4", "4", "no name"),
    ("1=2", r"\sqrt2 \approx 1.41", "constant equations are multiples of each other"), ("5m", "5", "a factor"),
    ("(y,x)=(3,4)", "(3,4)", "names in reverse"), ("xy", "yx", "a word is no product"), ("12:30", "6:15", "times"),
    ("0.333333", "0.3333333", "decimals are exact among themselves"), ("1.41422", r"\sqrt2", "neither rounded nor cut"),
    (r"1+10^{-20}\pi", "1", "a term lost in the rounding"),
    ("x^2-100x+2499", "|x^2-100x+2499|", "a kink that no real point is near"), ("-52_8", "-52_9", "a base below zero"),
    (r"f^{\prime\prime}(2)", "f'(2)", "a second derivative"), (r"\infty-\infty", "0", "infinity is no number"),
    (r"\frac12\text{ million}", "1/2", "half a million"), ("5 apples/3", "5", "a quotient"),
    (r"\frac{\infty}{\infty}", "1", "nor is it one here"), ("5 dimes and 3 nickels", "5, 3", "several units"),
    (r"3:4\infty", "3:4", "a ratio without a value"), ("8 sevenths", "8", "sevenths"), ("8 doubled", "8", "twice it"),
    ("8 lakh", "8", "a hundred thousand"),
]


@pytest.mark.parametrize("a, b, reason", WRONG, ids=[row[2] for row in WRONG])
def test_different_in_meaning(a, b, reason):
    assert not is_correct(a, b)
    assert a is None or not is_correct(b, a)


# Each makes (a wrong answer, a right one, the gold) of numbers a < b, a letter v, two nouns and two units.
CLASSES = {
    "another word": lambda a, b, v, n, u: (f"a {n[0]}", f"the {n[1]}.", rf"\text{{{n[1]}}}"),
    "a word that is a number": lambda a, b, v, n, u: (f"{a}", f"{a},000,000 {n[0]}", f"{a} million"),
    "a word that changes a number": lambda a, b, v, n, u: (f"{a} {['tenths', 'and a half'][a % 2]}", f"{a}.0", f"{a}"),
    "nouns exchanged": lambda a, b, v, n, u: (f"{b} {n[0]} and {a} {n[1]}", *[f"{a} {n[0]} and {b} {n[1]}"] * 2),
    "another unit": lambda a, b, v, n, u: (f"{a} {u[0]}", rf"{a}\textnormal{{ {u[1]}}}", f"{a} {u[1]}"),
    "a unit's exponent": lambda a, b, v, n, u: (f"{a} {u[0]}^3", f"{a}", rf"{a}\mathrm{{~{u[0]}}}^2"),
    "a part of a list": lambda a, b, v, n, u: (f"The answer is {a}, {b}, and 100.", f"So {b} and {a}.", f"{a},{b}"),
    "order of a point": lambda a, b, v, n, u: (f"({b},{a})", f"(x,y) = ({a},{b})", f"({a},{b})"),
    "what is denied": lambda a, b, v, n, u: (f"So ${v} \\neq {a}$.", f"The answer is not {b} but {a}.", f"{a}"),
    "a guess among two": lambda a, b, v, n, u: (f"The answer is {a} or {b}.", f"The answer is {a}!", f"{a}"),
    "sign of a power": lambda a, b, v, n, u: (f"{a}", f"{a}(-1)^{{{v}+2}}", f"{a}(-1)^{v}"),
    "a kink": lambda a, b, v, n, u: (f"{v}^2-{a}", f"|{a}-{v}^2|", f"|{v}^2-{a}|"),
    "a saturated formula": lambda a, b, v, n, u: (f"{b}", f"{b}-{b}e^{{-{a}{v}}}", f"{b}(1-e^{{-{a}{v}}})"),
    "a phase": lambda a, b, v, n, u: (rf"{a}\sin({b}\pi {v})+{a}", rf"-{a}\sin(-{b}\pi {v})", rf"{a}\sin({b}\pi {v})"),
    "a small number": lambda a, b, v, n, u: (f"e^{{-{b}}}", f"1/e^{{{a}}}", f"e^{{-{a}}}"),
    "next to nothing": lambda a, b, v, n, u: ("0", f"e^{{-{a}}}/e^{{{b}}}", f"e^{{-{a + b}}}"),
    "another argument": lambda a, b, v, n, u: (f"f({a})e^{{{v}}}", f"e^{{{v}}}f({a}+{b - a})", f"f({b})e^{{{v}}}"),
    "a value of a function": lambda a, b, v, n, u: (f"f({a}) = {b}", f"{b}", f"f({b}) = {b}"),
    "another name": lambda a, b, v, n, u: (f"BC = {a}", rf"AB \approx {a}", f"AB = {a}"),
    "another probability": lambda a, b, v, n, u: (f"P(B|A) = 1/{b}", rf"\frac1{{{b}}}", f"P(A|B) = 1/{b}"),
    "order of a ratio": lambda a, b, v, n, u: (f"{a}:{b}:1", f"{2 * b}:{2 * a}:2", f"{b}:{a}:1"),
    "a digit of a huge power": lambda a, b, v, n, u: (f"{b}^{{2008}}", f"{b}^{{2006}}*{b}", f"{b}^{{2007}}"),
    "a coefficient": lambda a, b, v, n, u: (f"{a}{v}^2+{b}", f"{b} + {b}{v}*{v}", f"{b}{v}^2+{b}"),
    "an end of an interval": lambda a, b, v, n, u: (f"{a} \\le {v} < {b}", f"({a},{b})", f"{a} < {v} < {b}"),
}


@pytest.mark.parametrize("name", CLASSES)
def test_class(name):
    """Each class of wrong answers that once earned a reward, and of right ones that earned none, over many members."""
    rng = random.Random(name)
    for _ in range(25):
        (a, b), nouns = sorted(rng.sample(range(2, 60), 2)), rng.sample(("circle", "apple", "dime", "line"), 2)
        wrong, right, gold = CLASSES[name](a, b, rng.choice("xtnz"), nouns, rng.sample(("m", "cm", "kg", "L"), 2))
        judge = [rewards.reward if re.match("[A-Z][a-z]* ", text) else is_correct for text in (wrong, right)]
        assert not judge[0](wrong, gold) and judge[1](right, gold) and is_correct(gold, gold), (wrong, right, gold)
        assert not is_correct(gold, wrong)


def test_one_change_makes_it_wrong():
    """A digit changed, or a term added, anywhere in any of the forms that answers have."""
    golds = [row[0] for row in RIGHT if re.search("[1-9]", row[0])]
    assert len(golds) > 80
    for gold in golds:
        for digit in re.finditer("[1-9]", gold):
            near = gold[:digit.start()] + str((int(digit[0]) + 3) % 9 + 1) + gold[digit.end():]
            assert not is_correct(near, gold) and not is_correct(gold + "+1", gold), near


def test_reward_is_one_or_zero():
    texts = ("37+48=206", "The answer is 205", "no idea", "")
    assert [rewards.reward(text, "206") for text in texts] == [1.0, 0.0, 0.0, 0.0]


# --- Cost and safety --------------------------------------------------------------------------------------------------
BOMBS = [
    ("9**9**9", "a tower"), ("10^{10^{10}}", "a tower in LaTeX"), ("1e99999", "an exponent"), ("(" * 400, "brackets"),
    ("4000!" * 90, "factorials"), (r"\binom{999}{499}+" * 24 + "1", "binomials"), ("[(" * 200, "two kinds of brackets"),
    ("9^{600}*" * 33 + "1", "a product of powers"), ("1/9^{99}+" * 24 + "1", "a sum of fractions"), ("|" * 400, "bars"),
    (r"\frac" * 10_000, "fractions nested 10,000 deep"), (r"\frac{" * 80 + "1", "fractions nested within the length"),
    ("2^" * 240 + "2", "exponents"), (r"\sin" * 120 + "x", "functions"), ("-" * 480 + "5", "signs"),
    ("$" * 9_000, "dollars"), (r"\(" * 5_000, "opened formulas"), ("5!" + "!" * 300, "factorials of factorials"),
    ("1" * 100_000, "100 kB of digits"), ("{" * 100_000, "100 kB of braces"), ("#### " * 20_000, "100 kB of marks"),
    (r"\boxed{" * 14_000, "100 kB of unclosed boxes"), ("answer is " * 10_000, "100 kB of statements"),
    ("5," * 50_000, "100 kB of list"), ("1," * 249 + "1", "a list"), (",".join(map(str, range(32))), "the longest set"),
    ("x/y/" * 49 + "z", "a long quotient"), ("(x+1)^{300}*" * 19 + "1", "a product of polynomials"),
    ("x=1," * 31 + "y=2", "a list of equations"), ("1=" * 200 + "1", "a chain of equations"),
    ("\x00\x1b[2J\u202e", "control characters"), ("1+" * 249 + "1", "a sum"), ('"' * 400, "quotes"),
]


def verdict_seconds(text):
    """Processor time of this thread: on a busy machine the clock on the wall measures the neighbours."""
    rewards.read.cache_clear(), rewards.symbol.cache_clear()
    start = time.thread_time()
    is_correct(text, text[:-1] + "3"), rewards.reward(text, "3")
    return time.thread_time() - start


@pytest.mark.parametrize("text, reason", BOMBS, ids=[row[1] for row in BOMBS])
def test_cost_is_bounded(text, reason):
    """Two readings and two verdicts, with room for slow machines."""
    assert min(verdict_seconds(text) for _ in range(3)) < 0.03


LIMITS = [
    ("1" * 500, "1" * 501, "characters"), ("2^{60000}", "2^{70000}", "size of a power"),
    ("1000!", "1001!", "factorials"), (r"\binom{1000}{2}", r"\binom{1001}{2}", "binomials"),
    (",".join("1" * 32), ",".join("1" * 33), "items of a set"),
    ("(" * 23 + "1" + ")" * 23, "(" * 24 + "1" + ")" * 24, "nesting"),
    ("9^{9000}*9^{9000}", "9^{15000}*9^{15000}", "size of a product"), ("1+" * 99 + "1", "1+" * 100 + "1", "signs"),
]


@pytest.mark.parametrize("within, beyond, reason", LIMITS, ids=[row[2] for row in LIMITS])
def test_limits(within, beyond, reason):
    """What keeps the cost bounded, where a test of time would only notice on a slow machine."""
    assert is_correct(within, within) and not is_correct(beyond, beyond)


def test_only_the_end_of_a_completion_is_read():
    assert rewards.extract_answer(r"\boxed{7}" + " so" * 3_000) == "7"
    assert rewards.extract_answer(r"\boxed{7}" + " so" * 4_000) is None


def test_works_in_a_thread_with_a_small_stack():
    """No signals, which only the main thread may use, and no deep recursion."""
    results, texts, size = [], [text for text, _ in BOMBS] + ["1/2"], threading.stack_size(256 * 1024)
    try:
        thread = threading.Thread(target=lambda: results.extend(is_correct(text, text) for text in texts))
        thread.start()
        thread.join()
    finally:
        threading.stack_size(size)
    assert len(results) == len(BOMBS) + 1 and results[-1] is True


PIECES = re.split(r"\s+", r"""\frac{ \frac \sqrt{ \sqrt[3]{ } { ( ) [ ] , ; | \{ \} ^ ^{ _8 ! % ^\circ + - * / = < \le
    \pm \cup \pi i e x y 0 1 2 7 12 0.5 1,000 9**9 1e5 \sin \log_2 \text{cm} \text{C} \begin{pmatrix} & \\
    \end{pmatrix} \left( \right] \infty \binom{5}{2} \cdot $ f( P(A) \approx : AB million apples cm m by \boxed{
    #### ² ½ − ٣ π √ ∞ apples even or and the answer is""")


def test_fuzz():
    """Seeded strings: only the documented exception, symmetric, equal to itself whatever can be read, and quick."""
    rng = random.Random(0)
    cases = [text for row in RIGHT for text in row[:2]]

    def string():
        if rng.random() < 0.4:
            return "".join(rng.choices(PIECES, k=rng.choice((1, 2, 3, 5, 8, 20))))
        letters = list(rng.choice(cases))
        for _ in range(rng.randint(0, 4)):
            place = rng.randrange(len(letters) + 1)
            letters[place:place + rng.randint(0, 1)] = [
                rng.choice((rng.choice(PIECES), chr(rng.randrange(1, 127)), chr(rng.randrange(127, 0x2400))))]
        return "".join(letters)

    strings, seconds, readable = [string() for _ in range(10_000)], [], 0
    for text, other in zip(strings, strings[-1:] + strings):
        start = time.thread_time()
        verdict = is_correct(text, other)
        seconds.append(time.thread_time() - start)
        assert is_correct(other, text) == verdict and rewards.reward(text, "12") in (0, 1), (text, other)
        understood = rewards.read(text).kind != "unreadable"
        assert is_correct(text, text) == understood, text
        readable += understood
    assert readable > 2_500  # else the strings test nothing
    assert sorted(seconds)[int(0.999 * len(seconds))] < 0.01


# --- Advantages -------------------------------------------------------------------------------------------------------
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def by_hand(rewards_, groups, kind):
    """The definition, one group after the other."""
    out = torch.empty_like(rewards_)
    for group in groups.unique():
        r = rewards_[groups == group]
        for index in (groups == group).nonzero().flatten().tolist():
            others = (r.sum() - rewards_[index]) / max(len(r) - 1, 1)
            out[index] = {"mean": rewards_[index] - r.mean(), "std": (rewards_[index] - r.mean()) / r.std(correction=0),
                          "loo": rewards_[index] - others}[kind]
    return out


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("kind", ["std", "mean", "loo"])
def test_advantages_equal_their_definition_whatever_the_order(kind, device):
    r = torch.rand(60, generator=torch.Generator().manual_seed(0)).to(device)
    groups = (torch.arange(60) % 7 * 100 - 3).to(device)  # not contiguous, not from 0, sizes 8 and 9
    advantages = group_advantages(r, groups, kind)
    assert advantages.device == r.device and advantages.dtype == r.dtype
    torch.testing.assert_close(advantages, by_hand(r, groups, kind))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1)).to(device)
    torch.testing.assert_close(group_advantages(r[order], groups[order], kind), advantages[order])
    for group in groups.unique():
        assert advantages[groups == group].sum().abs() < 1e-5


@pytest.mark.parametrize("kind", ["std", "mean", "loo"])
def test_equal_rewards_give_exactly_zero(kind):
    # the mean of three 0.1 is not 0.1; the last group has one member
    r = torch.tensor([0.1, 0.1, 0.1, 1.0, 1.0, 0.7])
    assert group_advantages(r, torch.tensor([5, 5, 5, 2, 2, 9]), kind).tolist() == [0.0] * 6
    assert group_advantages(torch.tensor([]), torch.tensor([], dtype=torch.long), kind).shape == (0,)


def test_advantages_worked_example():
    """r = 1, 0, 0, 0: mean 1/4, population std √3/4, mean of the others 0 or 1/3."""
    r, groups = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    expected = {"mean": [3 / 4, -1 / 4], "std": [3 ** 0.5, -(3 ** -0.5)], "loo": [1.0, -1 / 3]}
    for kind, (first, other) in expected.items():
        assert group_advantages(r, groups, kind).tolist() == pytest.approx([first, other, other, other])
    assert group_advantages(r.bfloat16(), groups).dtype == torch.bfloat16
    with pytest.raises(InputError, match="median"):
        group_advantages(r, groups, "median")


# --- Problems ---------------------------------------------------------------------------------------------------------
def test_chain_problems_are_fixed_distinct_and_apart():
    state = random.getstate()
    train, test = (chain_problems(500, split, seed=seed) for split, seed in (("train", 0), ("test", 1)))
    assert random.getstate() == state
    assert train == chain_problems(500, "train", seed=0) != chain_problems(500, "train", seed=2)
    assert len({problem.question for problem in train + test}) == 1000
    for problem in train + test:
        terms = problem.question.removesuffix("=").split("+")
        assert len(terms) == 4 and all(10 <= int(term) <= 99 for term in terms)
        assert sum(map(int, terms)) == int(problem.answer)
    assert {split_of(problem.question) for problem in train} == {"train"}
    # a hash that changed would mix old and new splits
    assert chain_problems(1, "test") == [Problem("49+46+79+15=", "189")]
    assert sum(split_of(f"{n}=") == "test" for n in range(1000)) == 273


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ROWS = [
    ({"question": "q", "answer": "3+4=<<3+4=7>>7\n#### 7"}, Problem("q", "7"), "GSM8K"),
    ({"problem": "q", "solution": r"so \boxed{\frac12}", "answer": r"\frac12"}, Problem("q", r"\frac12"),
     "MATH: the answer before the solution"),
    ({"problem": "q", "solution": r"so \boxed{\frac12}."}, Problem("q", r"\frac12"), "a boxed solution alone"),
    ({"Body": "There are 3.", "Question": "How many?", "Answer": 3.0}, Problem("There are 3. How many?", "3"), "SVAMP"),
    ({"Body": "If there are 3", "Question": "How many?", "Answer": 3.0}, Problem("If there are 3, How many?", "3"),
     "SVAMP, open end"),
    ({"question": "q", "final_answer": ["12"]}, Problem("q", "12"), "a list of one"),
    ({"prompt": "q", "answer": 7}, Problem("q", "7"), "a number"),
]


@pytest.mark.parametrize("row, problem, reason", ROWS, ids=[row[2] for row in ROWS])
def test_fields_are_found_by_name(tmp_path, row, problem, reason):
    assert load_problems(write(tmp_path / "p.jsonl", row), "all") == [problem]


def test_local_files_split_and_sample(tmp_path):
    path = write(tmp_path / "p.jsonl", *({"question": f"q{n}", "answer": n, "other": -n} for n in range(200)))
    train, test, everything = (load_problems(path, split) for split in ("train", "test", "all"))
    assert load_problems(path, "train", divide=False) == load_problems(path, "test", divide=False) == everything
    assert len(train) + len(test) == len(everything) == 200 and not set(train) & set(test) and test
    assert [problem.answer for problem in everything] == [str(n) for n in range(200)]  # in order
    sample = load_problems(path, "train", count=20, seed=1)
    assert len(set(sample)) == 20 and set(sample) <= set(train)
    assert sample == load_problems(path, "train", count=20, seed=1)
    assert sample != load_problems(path, "train", count=20, seed=2)
    assert load_problems(path, "all", answer_field="other")[3] == Problem("q3", "-3")


def test_parquet_equals_jsonl(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"question": f"q{n}", "answer": str(n)} for n in range(9)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "p.parquet")
    assert load_problems(str(tmp_path / "p.parquet"), "all") == load_problems(write(tmp_path / "p.jsonl", *rows), "all")


HUB = {"two": {"train": 8, "test": 4}, "one": {"test": 40}}


@pytest.fixture
def hub(monkeypatch):
    """A hub of two data sets, and no network."""
    import datasets

    def load_dataset(path, config=None):
        name = {"openai/gsm8k": "two", "HuggingFaceH4/MATH-500": "one"}.get(path)
        if name is None:
            raise ConnectionError(f"Couldn't reach '{path}' on the Hub\nmore lines")
        return {split: [{"question": f"{split} {n}", "answer": "1"} for n in range(size)]
                for split, size in HUB[name].items()}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_hub_splits(hub):
    assert [len(load_problems("gsm8k", split)) for split in ("train", "test", "all")] == [8, 4, 12]
    # published as a test split only
    train, test = (set(load_problems("math500", split)) for split in ("train", "test"))
    assert train and test and not train & test and len(train | test) == len(load_problems("math500", "all")) == 40


GOOD = {"question": "q", "answer": "1"}
given = lambda **arguments: arguments
MISTAKES = [
    (given(source="gsm9k"), "unknown data set 'gsm9k'", "a name that is nothing"),
    (given(source="nobody/nothing"), "cannot load the data set nobody/nothing: Couldn't reach", "the hub out of reach"),
    (given(source="gsm8k", split="dev"), "unknown split 'dev'", "a split"),
    (given(source="chain", count=None), "give a count", "chains without end"),
    (given(source="chain", operands=0, count=5), "0 operands", "no operands"),
    (given(source="chain", operands=1, count=50), "room for 1 to 11", "more chains than there are"),
    (given(source="chain", split="all", count=5), "unknown split 'all'", "chains have no whole"),
    (given(source="gsm8k", count=99), "has 8", "more problems than there are"),
    (given(source="gsm8k", count=0), "cannot take 0", "no problems"), (given(lines=[]), "has 0", "an empty file"),
    (given(source="missing.jsonl"), "no such file: missing.jsonl", "a missing file"),
    (given(source="missing.parquet"), "no such file: missing.parquet", "a missing parquet file"),
    (given(lines=[json.dumps(GOOD), '{"question": ']), 'line 2: no {"question"', "a broken line"),
    (given(lines=[json.dumps(GOOD), "", "[1]"]), 'line 3: no {"question"', "a line that is no object"),
    (given(lines=[b"\xff\xfe{"]), 'line 1: no {"question"', "not a text"), (given(lines=["", " "]), "has 0", "blanks"),
    (given(lines=['{"question": "Größe?", "answer": "2"}'.encode("latin-1")]), 'line 1: no {"question"', "Latin-1"),
    (given(lines=["\n".join([json.dumps(GOOD)] * 2).encode("utf-16")]), 'line 2: no {"question"', "UTF-16"),
    (given(lines=["[" * 100_000]), 'line 1: no {"question"', "nested too deeply"),
    (given(lines=['{"text": "q", "answer": "1"}']), "no field 'question'; it has text, answer", "no question"),
    (given(lines=['{"question": "q"}']), "no field 'answer'; it has question", "no answer"),
    (given(lines=[json.dumps(GOOD)], answer_field="gold"), "no field 'gold'; it has question, answer", "no field"),
    *[(given(lines=[json.dumps({"question": question, "answer": "1"})]),
       f"problem 1: the question is no text: '{question}'", reason) for question, reason in [
          ([], "no text"), (7, "a number"), (" ", "no words")]],
    *[(given(lines=[json.dumps({"question": "q", "answer": answer})]),
       f"problem 1: the answer is no text and no number: {str(answer)!r}", reason) for answer, reason in [
          (None, "null"), ([1, 2], "several answers"), ({"a": 1}, "an object"), (math.nan, "NaN")]],
    *[(given(lines=[json.dumps(GOOD), json.dumps({"question": "how", "answer": gold})]),
       f"problem 2: cannot read the gold answer {gold!r} ('how')", reason) for gold, reason in [
          ("", "no gold"), ("\\frac{1}{", "unbalanced"), ("1/0", "undefined"), ("???", "signs"),
          ("10^{10^{10}}", "a gold too large"), ("9 (apples", "half a unit")]],
]


@pytest.mark.parametrize("arguments, message, reason", MISTAKES, ids=[row[2] for row in MISTAKES])
def test_wrong_input_is_named_in_one_line(tmp_path, hub, arguments, message, reason):
    arguments = {"split": "all" if "lines" in arguments else "train", **arguments}
    if "lines" in arguments:
        lines = [line if isinstance(line, bytes) else line.encode() for line in arguments.pop("lines")]
        arguments["source"] = str(tmp_path / "p.jsonl")
        Path(arguments["source"]).write_bytes(b"\n".join(lines))
    with pytest.raises(InputError) as caught:
        load_problems(**arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# --- The command line -------------------------------------------------------------------------------------------------
def command_line(*arguments):
    command = [sys.executable, rewards.__file__, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_command_line_shows_each_step():
    """That the command still says how each side is read, and names its usage in one line."""
    lines = command_line(r"So it is \boxed{y = 1+2x}.", "2x+1").stdout.splitlines()
    assert lines == ["extracted: y = 1+2x", "read as: =(y, +(1, *(2, x)))", "gold as: +(*(2, x), 1)", "verdict: right"]
    usage = command_line("7")
    assert usage.returncode == 2 and usage.stderr.startswith("rewards.py: usage")
    assert len(usage.stderr.splitlines()) == 1
