"""The maker of the embedded policy, tutorial/pretrain.py."""

import random

import pretrain
from rewards import split_of, extract_answer, reward


def test_the_teacher_drops_carries_by_habit_and_makes_no_other_mistake():
    """Mistakes anywhere else would be noise, which sampling colder cures."""
    rng = random.Random(0)
    assert {pretrain.habitual_sum(12, 34, 1.0, rng) for _ in range(50)} == {46}
    sums = [pretrain.habitual_sum(37, 48, 0.6, rng) for _ in range(2000)]
    assert set(sums) == {85, 75} and 0.55 < sums.count(75) / 2000 < 0.65
    text = pretrain.worked_solution("37+48+25=", slip=0.0, guess=0.0, rng=rng)
    assert text == "\n37+48=85\n85+25=110\nSo \\boxed{110}." and reward(text, "110") == 1.0
    assert extract_answer(pretrain.worked_solution("37+48+25=", slip=1.0, guess=0.0, rng=rng)) == "90"


def test_a_training_batch_holds_training_problems_only_and_ends_every_solution():
    """A test problem seen in pretraining, a prompt trained on, or an end-of-sequence token left out."""
    tokenizer = pretrain.character_tokenizer()
    ids, labels = pretrain.training_batch(tokenizer, 32, 4, 0.6, 0.05, seed=1)
    assert ids.shape == labels.shape and len(ids) == 32
    for row, label in zip(ids.tolist(), labels.tolist()):
        text = tokenizer.decode(row, skip_special_tokens=True)
        question, solution = text.split("\n", 1)
        assert split_of(question) == "train"
        trained = [i for i in label if i != -100]
        assert tokenizer.decode(trained) == "\n" + solution + "<eos>"
        assert trained == row[len(question):len(question) + len(trained)]


def test_characters_survive_the_tokenizer():
    tokenizer = pretrain.character_tokenizer()
    text = "12+34=\n12+34=46\nSo \\boxed{46}. <ok>"
    assert tokenizer.decode(tokenizer.encode(text)) == text and len(tokenizer.encode(text)) == len(text)
