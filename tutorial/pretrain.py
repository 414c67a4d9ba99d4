"""Makes tutorial/tiny_base: the small policy that every example starts from.

    python tutorial/pretrain.py            # about ten minutes on two CPU cores

A Qwen3 of 0.15 M parameters reads characters and learns to add chains of two-digit numbers step by step:

    37+48+25=⏎37+48=85⏎85+25=110⏎So \\boxed{110}.

It learns from a teacher with a *habit*. Wherever the units carry, the teacher drops that carry more often than not
(37+48=75), and now and then it guesses the sum without working. So the right way of every step is known to the policy
but is not its likeliest one: sampling colder makes it worse, and no temperature cures it. A base whose mistakes were
mere noise would be cured by greedy decoding, and would make every method look good.

tutorial/long_base, which adds up to eight numbers, went on from there, with more carries right at first, then as few:

    python tutorial/pretrain.py --init tutorial/tiny_base --operands 8 --steps 400 --batch 128 --lr 2e-3 --out long
    python tutorial/pretrain.py --init long --operands 8 --slip 0.3 --steps 900 --batch 96 --lr 2e-3 --out long
    python tutorial/pretrain.py --init long --operands 8 --steps 250 --batch 96 --lr 1e-3 --out tutorial/long_base
"""

import argparse
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from rewards import chain_problems  # noqa: E402


def habitual_sum(a: int, b: int, slip: float, rng: random.Random) -> int:
    """a + b, but where the units carry, that carry is dropped with probability `slip`."""
    carries = a % 10 + b % 10 >= 10
    return a + b - (10 if carries and rng.random() < slip else 0)


def worked_solution(question: str, slip: float, guess: float, rng: random.Random) -> str:
    """A completion as the teacher would write it; with probability `guess` only a number near the sum."""
    numbers = [int(n) for n in question.rstrip("=").split("+")]
    if rng.random() < guess:
        return f"\nSo \\boxed{{{max(0, sum(numbers) + rng.randint(-30, 30))}}}."
    total, lines = numbers[0], []
    for n in numbers[1:]:
        following = habitual_sum(total, n, slip, rng)
        lines.append(f"{total}+{n}={following}")
        total = following
    return "\n" + "\n".join(lines) + f"\nSo \\boxed{{{total}}}."


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character: newline and printable ASCII, and three special tokens."""
    tokens = ["<pad>", "<eos>", "<unk>", "\n"] + [chr(c) for c in range(32, 127)]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>",
                                   unk_token="<unk>", clean_up_tokenization_spaces=False)


def training_batch(tokenizer, size: int, operands: int, slip: float, guess: float, seed: int):
    """ids and labels [size, T]; labels are −100 on prompts and padding. Half are of full length."""
    rng = random.Random(seed)
    rows = []
    for length in range(2, operands + 1):
        share = size // 2 if length == operands else size // 2 // max(1, operands - 2)
        for problem in chain_problems(share, "train", operands=length, seed=rng.randrange(2**31)):
            prompt = tokenizer.encode(problem.question)
            solution = tokenizer.encode(worked_solution(problem.question, slip, guess, rng)) + [tokenizer.eos_token_id]
            rows.append((prompt + solution, [-100] * len(prompt) + solution))
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
    return ids, labels


def pretrain(args) -> None:
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = character_tokenizer()
    model = Qwen3ForCausalLM.from_pretrained(args.init) if args.init else Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=args.width, intermediate_size=3 * args.width,
        num_hidden_layers=args.layers, num_attention_heads=4, num_key_value_heads=2, head_dim=args.width // 4,
        max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.05)
    bar = tqdm(range(args.steps), desc=f"pretraining {sum(p.numel() for p in model.parameters()):,} parameters")
    for step in bar:
        ids, labels = training_batch(tokenizer, args.batch, args.operands, args.slip, args.guess,
                                     hash((args.seed, step)))
        ids, labels = ids.to(device), labels.to(device)
        logits = model(input_ids=ids[:, :-1]).logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(nats_a_token=f"{loss.item():.4f}")
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(Path(__file__).parent / "tiny_base"), help="folder to write")
    parser.add_argument("--init", default="", help="checkpoint folder to go on from, in place of a fresh model")
    parser.add_argument("--operands", type=int, default=4, help="longest chain")
    parser.add_argument("--slip", type=float, default=0.6, help="probability that a step drops the carry it has")
    parser.add_argument("--guess", type=float, default=0.05, help="probability of answering without working")
    parser.add_argument("--width", type=int, default=64, help="hidden size")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000, help="updates")
    parser.add_argument("--batch", type=int, default=256, help="chains an update")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    pretrain(parser.parse_args())
