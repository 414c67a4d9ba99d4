"""What a user may give that cannot work, and text that means harm: one line, exit status 2, nothing executed."""

import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import (AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM, MambaConfig,
                          MambaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel, RobertaConfig,
                          RobertaForCausalLM, ViTConfig, ViTForImageClassification)

import conftest
import erpd
from rewards import chain_problems, load_problems, reward
from rollout import Memory

HERE, TINY = Path(erpd.__file__).parent, Path(conftest.TINY)
arguments = partial(conftest.arguments, problems=4, group=4, explore_updates=2)

# ------------------------------------------------------------------------------------- told before torch is imported

# (what is given, what the line must name); every number is also given below 0, without end and as a word.
EARLY = [({f.name: value}, "--" + f.name.replace("_", "-")) for f in fields(erpd.Config)
         if type(f.default) in (int, float) or f.name == "kl_budget" for value in ("-1", "inf", "nan", "much")]
EARLY += [
    (dict(problems=0), "--problems 0"), (dict(problems=2.5), "2.5"), (dict(seed=2**31), "--seed"),
    (dict(group=1), "--group 1"), (dict(temperature=0), "--temperature"), (dict(explore_lr=0), "--explore-lr"),
    (dict(loss="sappo"), "sappo"), (dict(loss="sapo:0.5"), "sapo:0.5"), (dict(loss="mse:1,nll:much"), "mse:1,nll:much"),
    (dict(loss=""), "--loss ''"), (dict(loss="sapo:0,nll:0"), "need weights"),
    (dict(loss="sapo,nll", signal="unlearned"), "than unlearned"), (dict(unlearn_loss="sappo"), "sappo"),
    (dict(signal="loud"), "loud"),
    (dict(method="magic"), "magic"), (dict(advantage="max"), "max"), (dict(precision="fp8"), "fp8"),
    (dict(template="no place"), "no place"), (dict(no_such_option=1), "--no-such-option"),
    (dict(run="taken"), "--resume runs/taken"), (dict(run="../out"), "../out"), (dict(run="a/b"), "a/b"),
    (dict(run=".."), ".."), (dict(run="/abroad"), "/abroad"), (dict(run="r" * 300), "name too long"),
    (dict(device="mps"), "--device 'mps'"), (dict(resume="runs/taken"), "takes the settings of that run"),
    (dict(model="folder"), "folder/config.json"), (dict(model="no/such/folder"), "no/such/folder"),
    (dict(operands=1, problems=99), "99 chains"), (dict(test_problems=10**9), "1000000000 chains"),
    (dict(data="no-such-data"), "no-such-data"), (dict(data="missing.parquet"), "missing.parquet"),
    (dict(test_data="missing.jsonl"), "missing.jsonl"), (dict(data="folder.jsonl"), "folder.jsonl"),
    (dict(data="cut.jsonl"), "cut.jsonl, line 731"), (dict(data="unsaid.jsonl"), "cannot read the gold"),
    (dict(data="good.jsonl", question_field="riddle"), "riddle"),
    (dict(data="good.jsonl", problems=200), "200 problems"), (dict(data="arr.json"), "neither .jsonl nor .parquet"),
    (dict(data="good.jsonl", test_data="./good.jsonl"), "trained on, too"),
]  # what else is wrong with a file: test_rewards.py, MISTAKES


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A folder with files that are wrong."""
    folder = tmp_path_factory.mktemp("wrong")
    good, unsaid = ([json.dumps({"question": f"{n}+1=", "answer": answer or str(n + 1)}) for n in range(100)]
                    for answer in ("", "???"))
    files = {"good": good, "unsaid": unsaid, "cut": (good * 8)[:730] + ['{"question": "1+']}
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    (folder / "arr.json").write_text("[]")
    for name in ("runs/taken", "folder", "folder.jsonl"):
        (folder / name).mkdir(parents=True)
    return folder


def test_what_needs_no_model_is_refused_at_once(there):
    """Mistake: ten seconds of imports to hear of a slip of the keyboard. Each: one line, status 2, no torch, ≤ 1 s."""
    script = """
import contextlib, io, json, runpy, sys, time
for given in json.load(sys.stdin):
    sys.argv, began, said, status = ["erpd.py", *given], time.perf_counter(), io.StringIO(), None
    with contextlib.redirect_stderr(said):
        try:
            runpy.run_path(PATH, run_name="__main__")
        except SystemExit as ended:
            status = ended.code
    print(json.dumps([status, said.getvalue(), time.perf_counter() - began, "torch" in sys.modules]))
""".replace("PATH", repr(str(HERE / "erpd.py")))
    cases = [arguments(**settings) for settings, _ in EARLY]
    done = subprocess.run([sys.executable, "-c", script], cwd=there, input=json.dumps(cases), text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(HERE)})
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(EARLY) >= 60, done.stderr
    for (settings, named), (status, said, seconds, torch_too) in zip(EARLY, answers):
        assert status == 2 and said.startswith("erpd.py: ") and said.count("\n") == 1, (settings, said)
        assert named in said and seconds < 1 and not torch_too, (settings, said, seconds)


def test_an_interruption_before_the_imports_is_one_line_too(tmp_path):
    script = f"""
import os, rewards, runpy, signal, sys, time
rewards.load_problems = lambda *a, **k: (os.kill(os.getpid(), signal.SIGINT), time.sleep(9))
sys.argv = ["erpd.py"]
runpy.run_path({str(HERE / "erpd.py")!r}, run_name="__main__")"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, text=True, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(HERE)})
    assert (done.returncode, done.stderr) == (130, "erpd.py: stopped\n")


# ------------------------------------------------------------------------------------------------ told by the model

def no_end(model, tokenizer):
    tokenizer.eos_token = model.config.eos_token_id = model.generation_config.eos_token_id = None


# what is done to model and tokenizer, another model in its place, or a file spoilt (or lost); what is said
SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
LATE = {
    "NaN weights": (lambda model, _: model.lm_head.weight.data[0].fill_(torch.nan), "not finite"),
    "finite weights, no finite logit": (lambda model, _: model.model.norm.weight.data.fill_(1e38), "logits are not"),
    "a tokenizer of another model": (lambda _, tokenizer: tokenizer.add_tokens(["<more>"]), "embedding of"),
    "no end of sequence": (no_end, "end-of-sequence"),
    "an encoder": (lambda *_: BertForMaskedLM(BertConfig(eos_token_id=1, **SIZE)), "causal"),
    "a state space model": (lambda *_: MambaForCausalLM(MambaConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1,
                                                                    state_size=4)), "past_key_values"),
    "a decoder with positions of its own": (lambda *_: RobertaForCausalLM(RobertaConfig(
        vocab_size=99, is_decoder=True, initializer_range=0.4, eos_token_id=1, **SIZE)), "beside a longer one"),
    "experts with their router's logits": (lambda *_: MixtralForCausalLM(MixtralConfig(
        vocab_size=99, num_key_value_heads=2, output_router_logits=True, eos_token_id=1, **SIZE)), "cannot be sampled"),
    "a model of pictures": (lambda *_: ViTForImageClassification(ViTConfig(image_size=16, **SIZE)), "can load"),
    "no weights": (("model.safetensors", None), "can load"), "no tokenizer": (("tokenizer*", None), "has no tokenizer"),
    "cut weights": (("model.safetensors", (TINY / "model.safetensors").read_bytes()[:999]), "can load"),
    "no JSON": (("config.json", b"{"), "can load"),
    "another kind of model": (("config.json", b'{"model_type": "magic"}'), "magic"),
}
SETTINGS = [(dict(model="no/such-model"), "can load"), (dict(device="cuda:99"), "cuda:99"),
            (dict(max_new_tokens=600), "context"), (dict(data="long.jsonl", test_data="chain"), "context of"),
            (dict(data="hard.jsonl", test_problems=1), "' is right"),
            (dict(data="nobody/nothing"), "nobody/nothing"), (dict(data="broken.parquet"), "broken.parquet"),
            (dict(resume="runs/damaged"), "no run of this version"), (dict(resume="runs/other"), "other settings")]


def refused(capsys, named: str, **settings) -> None:
    assert erpd.main(arguments(**settings)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("erpd.py: ") and named in lines[-1] and "Traceback" not in "".join(lines)


@pytest.mark.parametrize("broken, named", LATE.values(), ids=LATE)
def test_a_folder_that_is_no_policy_is_refused(tmp_path, monkeypatch, capsys, broken, named):
    """Mistake: a traceback, or a run of hours, with a folder that cannot serve as a policy."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(TINY), AutoTokenizer.from_pretrained(TINY)
    other = broken(model, tokenizer) if callable(broken) else None
    (other if isinstance(other, PreTrainedModel) else model).save_pretrained("policy")
    tokenizer.save_pretrained("policy")
    if not callable(broken):
        for file in Path("policy").glob(broken[0]):
            file.unlink() if broken[1] is None else file.write_bytes(broken[1])
    refused(capsys, named, model="policy")


def test_packed_weights_are_refused(monkeypatch, capsys):
    """Mistake: a quantised policy, of which a few norms would be trained and nothing else."""
    monkeypatch.setattr(PreTrainedModel, "is_quantized", True, raising=False)
    refused(capsys, "quantised", run="packed")


@pytest.mark.parametrize("settings, named", SETTINGS, ids=[str(s) for s, _ in SETTINGS])
def test_what_only_a_run_can_tell(tmp_path, monkeypatch, capsys, settings, named):
    monkeypatch.chdir(tmp_path)
    hard = [json.dumps({"question": f"{n}=", "answer": str(10**9 + n)}) + "\n" for n in range(40)]
    (tmp_path / "hard.jsonl").write_text("".join(hard))
    (tmp_path / "long.jsonl").write_text("".join(json.dumps({"question": f"{n}" + "+1" * 50_000 + "=", "answer": "2"})
                                                 + "\n" for n in range(4)) if "long" in str(settings) else "")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    for name, text in ("damaged", "{"), ("other", json.dumps({"group": 4, "run": "other", "model": str(TINY)})):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").write_text(text)
    Memory(tmp_path / "runs" / "other", "of another run").put("rows", [])
    if "resume" in settings:
        assert erpd.main(["--resume", settings["resume"]]) == 2
        assert named in capsys.readouterr().err
    else:
        refused(capsys, named, **settings)


def test_files_of_other_systems_are_read(tmp_path):
    """A byte-order mark, Windows line ends, blank lines, numbers as answers, a problem twice, a line of 10 MB."""
    rows = [{"question": "1+1=", "answer": 2}, {"question": "1+1=", "answer": [2.0]},
            {"question": "x" * 10**7, "answer": "3"}]
    text = "\ufeff" + "\r\n\r\n".join(json.dumps(row) for row in rows) + "\r\n"
    (tmp_path / "windows.jsonl").write_text(text, encoding="utf-8", newline="")
    assert [p.answer for p in load_problems(str(tmp_path / "windows.jsonl"), "all")] == ["2", "2", "3"]


# ----------------------------------------------------------------------------------------------- text that means harm

class Bomb:
    """Pickled, it writes a file where it is loaded."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def test_nothing_that_is_loaded_is_executed(tmp_path, monkeypatch, capsys):
    """Weights and memory that are pickles of something else; code that comes with a model."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY, "pickled")
    Path("pickled/model.safetensors").unlink()
    torch.save({"model.norm.weight": Bomb()}, "pickled/pytorch_model.bin")
    refused(capsys, "--model", model="pickled")
    shutil.copytree(TINY, "coded")
    config = json.loads((TINY / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    Path("coded/config.json").write_text(json.dumps(config))
    Path("coded/own.py").write_text("import os; os.system('touch executed')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # who is asked whether to trust it might say yes
    refused(capsys, "--model", model="coded")
    Path("kept").mkdir()
    torch.save({"of": "", "value": Bomb()}, "kept/state.pt")
    assert Memory(Path("kept")).get("state") is None
    Path("kept/raw.pt").write_bytes(pickle.dumps(Bomb()))
    assert Memory(Path("kept")).get("raw") is None
    assert not Path("executed").exists()
    for source in ("erpd.py", "rollout.py", "rewards.py", "kl.py"):
        text = (HERE / source).read_text()
        assert not re.search("trust_remote_code(?!=False)|weights_only(?!=True)|pickle", text), source
        assert not re.search(r"(?<![.\w])(eval|exec|system|popen)\(|subprocess", text), source


COMMAND = "__import__('os').system('touch executed')"
HOSTILE = ["{question}", "{0}{1!r}{__class__}", "%s%n%(x)s", "../../etc/passwd", "$(touch executed)", COMMAND,
           f"\\boxed{{{COMMAND}}}", "\\boxed{" * 5000, "\\boxed{9^{9^{9^{9}}}}", "\\frac" * 20_000, "= " * 30_000,
           "\\boxed{" + "9" * 100_000 + "!}", "\\boxed{\\input{/etc/passwd}}", "\x00\x1b[2J\ud800", "<eos>" * 1000,
           "(" * 50_000, "1e999999999", "#### " * 9999, "\\boxed{(((1+1)^{99})^{99})^{99}}", "`touch executed`",
           "\\boxed{\\binom{99999999}{5}}", "the answer is " * 5000]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_completions_and_answers_cost_nothing(tmp_path, monkeypatch, text):
    """As a completion, and as a gold answer: a verdict in a moment, and nothing happens."""
    monkeypatch.chdir(tmp_path)
    began = time.perf_counter()
    assert reward(text, "7") == 0 and reward("\\boxed{7}", text[:2000]) == 0
    assert time.perf_counter() - began < 2 and not list(tmp_path.iterdir())


def test_hostile_problems_run_with_no_network(tmp_path, monkeypatch, capsys):
    """A whole run, offline, on questions that are templates, paths and commands. No socket is opened."""
    monkeypatch.chdir(tmp_path)

    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("connect", "connect_ex", "bind", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    sums = chain_problems(200, "train", operands=2)
    rows = [{"question": p.question if n % 3 else HOSTILE[n // 3 % 6][:40] + p.question, "answer": p.answer}
            for n, p in enumerate(sums)]
    Path("../x{question}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = arguments(data="../x{question}.jsonl", problems=16, template="{question}", max_new_tokens=24)
    assert erpd.main(given) == 0, capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs"]
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["erpd-x{question}-s0"]
