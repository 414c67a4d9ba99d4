"""Tiny policies, a tiny tokenizer and a small run for the tests. Everything runs on the GPU where there is one."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may ask the network
sys.path[:0] = [str(Path(__file__).parents[1] / part) for part in (".", "tutorial", "figures")]

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import CohereConfig, Gemma2Config, GPT2Config, GraniteConfig, Lfm2Config, PhiConfig
from transformers import (CohereForCausalLM, Gemma2ForCausalLM, GPT2LMHeadModel, GraniteForCausalLM, Lfm2ForCausalLM,
                          Llama4ForCausalLM, Llama4TextConfig, PhiForCausalLM, PreTrainedTokenizerFast, Qwen3Config,
                          Qwen3ForCausalLM)

from rewards import chain_problems
from rollout import collect, load_policy

TINY = str(Path(__file__).resolve().parents[1] / "tutorial" / "tiny_base")
SMALL = dict(model=TINY, explore_lr=1e-4, problems=8, group=8, rounds=1, test_problems=8, test_samples=2,
             curve_samples=1, limit_samples=2, explore_updates=4, unlearn_updates=2, distill_updates=2,
             explore_batch=32, distill_batch=32, operands=3)


def arguments(**settings):
    """The command line of a small run, with other settings."""
    return [part for name, value in (SMALL | settings).items() for part in (f"--{name.replace('_', '-')}", str(value))]


def weights(model):
    return torch.cat([p.detach().flatten().cpu() for p in model.parameters()])


# "a" and "b" merge to "ab" in text, but a policy may as well choose "a" and then "b".
WORDS = ["<eos>", "<user>", "<model>", *"0123456789", "+", "=", "a", "b", "ab"]
EOS = WORDS.index("<eos>")
V = len(WORDS)
CHAT = "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"

SIZES = {"vocab_size": V, "eos_token_id": EOS, "bos_token_id": None, "pad_token_id": None, "initializer_range": 0.4}
LAYERS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "max_position_embeddings": 48}
KINDS = {
    # rotary positions, tied embeddings
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**LAYERS, "head_dim": 4, "tie_word_embeddings": True}),
    # absolute position embeddings, dropout on in its config
    "gpt2": (GPT2LMHeadModel, GPT2Config, {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 48}),
    # logits capped at ±3, a window of 6 tokens in every other layer
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {**LAYERS, "head_dim": 4, "final_logit_softcapping": 3.0,
                                                 "sliding_window": 6}),
    # scaled logits; a bias in the output layer; convolutions, whose cache is no keys and values
    "cohere": (CohereForCausalLM, CohereConfig, {**LAYERS, "logit_scale": 0.3}),
    "granite": (GraniteForCausalLM, GraniteConfig, {**LAYERS, "logits_scaling": 4.0}),
    "phi": (PhiForCausalLM, PhiConfig, LAYERS),
    # experts; its base model is itself
    "llama4": (Llama4ForCausalLM, Llama4TextConfig, {**LAYERS, "head_dim": 4, "intermediate_size_mlp": 32,
                                                     "num_local_experts": 2}),
    "lfm2": (Lfm2ForCausalLM, Lfm2Config, {**LAYERS, "layer_types": ["conv", "full_attention"]}),
}


@pytest.fixture(scope="session")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def stage(device):
    """(base, tokenizer, problems, rollouts): the embedded policy and a batch of 64 completions it sampled."""
    base, tokenizer = load_policy(TINY, device)
    problems = chain_problems(8, "train", operands=3, seed=0)
    return base, tokenizer, problems, collect(base, tokenizer, problems, 8, max_new_tokens=48, seed=0)


@pytest.fixture(scope="session")
def make_model(device):
    """make_model(name, seed, **settings): a random policy over V tokens, far from uniform, in eval mode."""
    def make(name: str, seed: int = 0, **settings):
        kind, config, its_own = KINDS[name]
        torch.manual_seed(seed)
        return kind(config(**SIZES, **its_own, **settings)).to(device).eval()
    return make


@pytest.fixture(params=["qwen3", "gpt2", "gemma2"])
def model(request, make_model):
    return make_model(request.param)


@pytest.fixture(scope="session")
def make_bigram(device):
    """make_bigram(table): a policy whose logits are table[last token], [V, V]: a Qwen3 whose layers add nothing."""
    def make(table: torch.Tensor):
        size = len(table)
        settings = {**SIZES, **LAYERS, "vocab_size": size, "hidden_size": size, "num_hidden_layers": 1, "head_dim": 4}
        model = Qwen3ForCausalLM(Qwen3Config(**settings, tie_word_embeddings=False, rms_norm_eps=1e-12))
        with torch.no_grad():
            model.model.layers[0].self_attn.o_proj.weight.zero_()
            model.model.layers[0].mlp.down_proj.weight.zero_()
            model.model.embed_tokens.weight.copy_(torch.eye(size))
            model.model.norm.weight.fill_(size ** -0.5)  # the norm of a one-hot vector is √V times it
            model.lm_head.weight.copy_(table.T)
        return model.to(device).eval()
    return make


@pytest.fixture(scope="session")
def make_tokenizer():
    def make(chat_template: str | None = None) -> PreTrainedTokenizerFast:
        text = Tokenizer(BPE({word: i for i, word in enumerate(WORDS)}, [("a", "b")]))
        text.decoder = Fuse()
        return PreTrainedTokenizerFast(tokenizer_object=text, eos_token="<eos>", chat_template=chat_template,
                                       additional_special_tokens=["<user>", "<model>"])
    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer):
    return make_tokenizer()
