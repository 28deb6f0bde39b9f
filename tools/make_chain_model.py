"""Makes hapo_async/assets/chain: the tokenizer and the warm-start model of the built-in task, from a seed.

    python tools/make_chain_model.py [--out FOLDER] [--seed 1] [--check]

The model is trained to know every single step, and to have a bad habit: on a hard chain (k = 4..6) it goes on after a
step with a small probability only, `habit`, else it boxes what it has. Both are put in by one cross-entropy:

- Rows are easy chains in full and hard chains that stop after j <= k steps, j uniform. Every token is an ordinary
  target except the *decision* after a step of a hard chain (next tag or ``\\boxed{``), so the skill does not depend on
  the habit: whoever goes on by luck goes on correctly.
- At a decision before the last step the target is the distribution {next tag: habit, ``\\boxed{``: 1 - habit}.

So a whole solution has a probability near habit^(k-1): far too rare for GRPO to meet it, while each single decision is
likely enough for a demonstration to raise it. The measured calibration is printed and asserted. A minute or two on one
core. The same seed gives the same model on the same machine; on another CPU it differs by rounding, which is why the
calibration is asserted and not the bytes.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hapo_async import toy

PAD, EOS, BOXED = "<pad>", "<eos>", "\\boxed{"
VOCABULARY = 100

BATCH = 96
SEED = 1  # with seed 0 the model misses the operator of the third step at some lengths; check() says so


@dataclass(frozen=True)
class Phase:
    """``habit`` is the probability of going on that is put in; ``lr`` falls to zero along a cosine."""

    habit: float
    steps: int
    lr: float
    warmup: int


PHASES = (
    Phase(habit=0.05, steps=1500, lr=4e-3, warmup=100),  # the skill, and the habit in a mild form
    Phase(habit=0.005, steps=250, lr=1e-3, warmup=10),  # the habit hardens
)


@dataclass(frozen=True)
class Calibration:
    """What decides whether the built-in task shows what it should. Rates over ``n`` eval prompts."""

    easy_greedy: float  # k = 2, 3 solved greedily
    easy_sampled: float  # ... and by one sample at temperature 1, as the probability of the written solution
    hard_greedy: float
    teacher_probability: float  # mean over hard prompts of the probability of the whole written solution
    go_on: float  # geometric mean of the probability of a tag at the decisions of hard chains
    skill: float  # mean over hard prompts of the probability of all tokens but the decisions
    greedy: float  # pass@1 on the mixture


def build_tokenizer() -> Qwen2Tokenizer:
    """One token per printable ASCII character, tab and newline; ``\\boxed{`` is one token. 100 ids, each decodable.

    It is a byte-level Qwen2Tokenizer without merges: AutoTokenizer makes that class of whatever a Qwen2 folder holds.
    Other characters have no token and are left out.
    """
    characters = ["\t", "\n", *map(chr, range(32, 127))]
    as_bytes = {"\t": "ĉ", "\n": "Ċ", " ": "Ġ"}  # how byte-level tokenizers write white space
    vocabulary = [PAD, EOS, *(as_bytes.get(c, c) for c in characters)]
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)},
        merges=[],
        unk_token=None,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    tokenizer.add_tokens([AddedToken(BOXED, normalized=False, special=False)])
    assert len(tokenizer) == VOCABULARY, len(tokenizer)
    return tokenizer


def build_model(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2ForCausalLM:
    """A Qwen2 of about 90k parameters. Head size 32: vLLM on CPU has no smaller one."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return Qwen2ForCausalLM(config).float()


def training_row(rng: random.Random) -> tuple[str, str, int, bool]:
    """(prompt, response, steps written, hard): an easy chain in full, or a hard one that stops after j steps."""
    while True:
        hard = rng.random() < 0.5
        k = rng.choice(toy.HARD_STEPS) if hard else rng.choice((1, 2, 2, 3, 3))
        chain = toy.draw(rng, k)
        row = toy.write(chain)
        if toy.split_of(row["prompt"]) != "train":
            continue
        if not hard:
            return row["prompt"], row["solution"], k, False
        j = 1 + int(rng.random() * k)
        stopped = toy.write(toy.Chain(start=chain["start"], steps=chain["steps"][:j]))
        return row["prompt"], stopped["solution"], j, True


@dataclass
class Batch:
    """ids [B, T] right-padded; target [B, T] (-100: no target); decision [B, T] holds the tag's id, else -1."""

    ids: torch.Tensor
    target: torch.Tensor
    decision: torch.Tensor


def encode_batch(tokenizer: Qwen2Tokenizer, rng: random.Random, size: int) -> Batch:
    """Position t of ``target`` and ``decision`` speaks about the token after position t."""
    box, tag_ids = tokenizer.convert_tokens_to_ids(BOXED), tokenizer.convert_tokens_to_ids(list(toy.TAGS))
    lines = []
    for _ in range(size):
        prompt, response, written, hard = training_row(rng)
        ids = [*tokenizer.encode(prompt + response), tokenizer.eos_token_id]
        k, start = prompt.count("+") + prompt.count("-") + prompt.count("*"), len(prompt)
        target = [-100] * (start - 1) + ids[start:] + [-100]
        decision = [-1] * len(ids)
        for i in range(1, written + 1 if hard else 1):  # after step i of a hard chain
            at = start + 9 * i - 1
            if i < k:
                assert ids[at + 1] in (box, tag_ids[i])
                target[at], decision[at] = -100, tag_ids[i]
        lines.append((ids, target, decision))
    longest = max(len(ids) for ids, _, _ in lines)
    pads = (tokenizer.pad_token_id, -100, -1)
    columns = [torch.tensor([line[c] + [pads[c]] * (longest - len(line[c])) for line in lines]) for c in range(3)]
    return Batch(*columns)


def loss_of(model: Qwen2ForCausalLM, batch: Batch, box: int, habit: float) -> torch.Tensor:
    """Mean cross-entropy over hard targets and decisions together."""
    logp = model(input_ids=batch.ids, use_cache=False).logits.float().log_softmax(-1)
    flat, target, decision = logp.flatten(0, 1), batch.target.flatten(), batch.decision.flatten()
    plain = F.nll_loss(flat, target, ignore_index=-100, reduction="sum")
    at = decision >= 0
    chosen = flat[at]
    soft = -(habit * chosen.gather(1, decision[at, None]).sum() + (1 - habit) * chosen[:, box].sum())
    return (plain + soft) / ((target >= 0).sum() + at.sum())


def train(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, phase: Phase, seed: int) -> None:
    """One phase: AdamW, cosine to zero."""
    rng, box = random.Random(seed), tokenizer.convert_tokens_to_ids(BOXED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.lr, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(phase.steps):
        rate = min(1.0, (step + 1) / phase.warmup) * 0.5 * (1 + math.cos(math.pi * step / phase.steps))
        for group in optimizer.param_groups:
            group["lr"] = phase.lr * rate
        loss = loss_of(model, encode_batch(tokenizer, rng, BATCH), box, phase.habit)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == phase.steps - 1:
            print(f"habit {phase.habit}  step {step:5d}  loss {loss.item():.4f}", flush=True)


@torch.no_grad()
def measure(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, n: int = 400, seed: int = 1) -> Calibration:
    """Teacher-forced on ``n`` eval prompts. Greedy decoding solves a prompt iff each token of the only solution is the
    arg-max after the ones before it, so no decoding is needed."""
    solved, probability, skill, decisions, hard = [], [], [], [], []
    for row in toy.rows("eval", n, seed):
        prompt = tokenizer.encode(row["prompt"])
        ids = torch.tensor([prompt + tokenizer.encode(row["solution"]) + [tokenizer.eos_token_id]])
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0, len(prompt) - 1 :].float()
        target = ids[0, len(prompt) :]
        logp = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
        at = [9 * i for i in range(1, row["k"])]
        solved.append(bool((logits.argmax(-1) == target).all()))
        probability.append(logp.sum().exp().item())
        decisions.append(logp[at].mean().item())
        skill.append((logp.sum() - logp[at].sum()).exp().item())
        hard.append(row["k"] in toy.HARD_STEPS)

    def mean(values: list, which: bool) -> float:
        chosen = [float(v) for v, h in zip(values, hard, strict=True) if h is which]
        return sum(chosen) / len(chosen)

    return Calibration(
        easy_greedy=mean(solved, False),
        easy_sampled=mean(probability, False),
        hard_greedy=mean(solved, True),
        teacher_probability=mean(probability, True),
        go_on=math.exp(mean(decisions, True)),
        skill=mean(skill, True),
        greedy=sum(solved) / len(solved),
    )


def check(c: Calibration) -> None:
    """Raises SystemExit when the model would not show what the task is for."""
    rules = {
        "easy chains are solved (>= .98)": c.easy_greedy >= 0.98 and c.easy_sampled >= 0.95,
        "whoever goes on goes on correctly (>= .9)": c.skill >= 0.9,
        "a whole hard solution is too rare to be met": c.teacher_probability <= 3e-7,
        "going on is likely enough to be taught": 0.003 <= c.go_on <= 0.01,
        "greedy pass@1 on the mixture (<= .33)": c.greedy <= 0.33,
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise SystemExit("not calibrated: " + "; ".join(broken))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=toy.MODEL_DIR, help="folder to write, or to check")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--check", action="store_true", help="only measure the folder that is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.check:
        tokenizer = build_tokenizer()
        model = build_model(tokenizer, args.seed)
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
        for number, phase in enumerate(PHASES):
            train(model, tokenizer, phase, args.seed + 1000 * number)
        model.save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(args.out), AutoTokenizer.from_pretrained(args.out)
    calibration = measure(model.eval(), tokenizer)
    for name, value in asdict(calibration).items():
        print(f"{name:20s} {value:.6f}")
    check(calibration)
    print(f"calibrated; wrote {args.out}" if not args.check else "calibrated")


if __name__ == "__main__":
    main()
