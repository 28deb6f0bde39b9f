"""Times the output head against a naive one and measures its memory; prints JSON.

    python tools/bench_head.py [--write] [--repeats 3] [--full]

time: CPU seconds of forward + backward with the weight's gradient, one thread, fp32, log-probs alone, the two heads in
turn; ratio = best / best of the naive head. memory: bytes that the allocator handed out at one time, inputs and the
gradients of parameters excluded, for combinations of outputs at the full vocabulary, next to ``peak_extra_bytes``;
share_at_32768 is the latter at 32,768 tokens over one fp32 [32768, 152064]. With a GPU it times and measures that too.
``--write`` also writes benchmarks/results/head.json; ``--full`` adds larger sizes, every combination, and one pass over
all 32,768 tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from hapo_async.learner.head import DEFAULT_CHUNK_TOKENS, peak_extra_bytes, token_logprobs

TOKENS, VOCAB = 32_768, 152_064
SIZES = ((2048, 48, 64), (8192, 48, 64), (4096, 1000, 64), (4096, 1000, 1024), (4096, 32_000, 64), (2048, 32_000, 1024))
LARGE_SIZES = ((8192, 32_000, 64), (4096, 32_000, 1024))
TOPK = 8
TARGET = Path(__file__).parents[1] / "benchmarks" / "results" / "head.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/head.json")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the measured combinations")
    parser.add_argument("--full", action="store_true", help="larger sizes, every combination, all 32,768 tokens")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = SIZES + LARGE_SIZES if args.full else SIZES
    result: dict[str, Any] = {**versions(), "time": [timed(*size, args.repeats) for size in sizes]}
    asked = [*combinations()] if args.full else [*combinations()][::5]
    result["memory"] = [measured(args.tokens, **wanted) for wanted in asked]
    if args.full:
        result["memory_full"] = measured(TOKENS, entropy_grad=True, topk=TOPK, forward_kl=True, future_lam=1.0)
    if torch.cuda.is_available():
        result["gpu"] = [on_gpu(hidden, args.repeats) for hidden in (1024, 3584)]
    text = json.dumps(result, indent=1)
    print(text)
    if args.write:
        TARGET.parent.mkdir(parents=True, exist_ok=True)
        TARGET.write_text(text + "\n")


def versions() -> dict[str, Any]:
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": names[0] if names else None,
        "gpu": gpu,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """[N]: log-probs by way of all logits."""
    return torch.log_softmax(hidden @ weight.t(), -1).gather(-1, targets[:, None]).squeeze(-1)


def inputs(n: int, vocab: int, hidden: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """hidden [n, H], weight [vocab, H] and targets [n], seeded; logits have a standard deviation of 3."""
    g = torch.Generator().manual_seed(0)
    states = torch.randn(n, hidden, generator=g).to(device, dtype).requires_grad_()
    weight = (torch.randn(vocab, hidden, generator=g) * 3 / hidden**0.5).to(device, dtype).requires_grad_()
    return states, weight, torch.randint(vocab, (n,), generator=g).to(device)


def timed(n: int, vocab: int, hidden: int, repeats: int) -> dict[str, Any]:
    """Both heads in turn; small sizes repeat more often, because their noise is relatively larger."""
    states, weight, targets = inputs(n, vocab, hidden, torch.float32)
    heads: tuple[Callable[[], Tensor], ...] = (
        lambda: token_logprobs(states, weight, targets).logp,
        lambda: naive(states, weight, targets),
    )
    rounds = max(repeats, min(100, int(5e10 / (n * vocab * (hidden + 400)))))
    seconds: list[list[float]] = [[], []]
    for i, which in product(range(rounds + 1), range(2)):
        taken = _pass(heads[which], (states, weight))
        if i > 0:  # the first round warms up
            seconds[which].append(taken)
    best = [min(s) for s in seconds]
    middle = [statistics.median(s) for s in seconds]
    size = {"tokens": n, "vocab": vocab, "hidden": hidden, "rounds": rounds}
    return size | {
        "naive_s": _round(best[1]),
        "head_s": _round(best[0]),
        "ratio": _round(best[0] / best[1]),
        "ratio_of_medians": _round(middle[0] / middle[1]),
    }


def _pass(score: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> float:
    start = time.process_time()
    torch.autograd.grad(score().sum(), leaves)
    return time.process_time() - start


def combinations() -> Iterator[dict[str, Any]]:
    """Every combination of outputs besides log-probs."""
    for entropy, topk, kl, future in product((False, True), repeat=4):
        yield {
            "entropy_grad": entropy,
            "topk": TOPK if topk else 0,
            "forward_kl": kl,
            "future_lam": 1.0 if future else None,
        }


def measured(
    n: int,
    vocab: int = VOCAB,
    hidden: int = 64,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    entropy_grad: bool = False,
    topk: int = 0,
    forward_kl: bool = False,
    future_lam: float | None = None,
) -> dict[str, Any]:
    """Peak extra bytes of one forward and backward with a temperature per token, next to the computed bound."""
    states, weight, targets = inputs(n, vocab, hidden, dtype, device)
    wanted: dict[str, Any] = {"temperature": torch.full((n,), 0.7, device=device), "entropy_grad": entropy_grad}
    wanted |= {"forward_kl": forward_kl, "future_lam": future_lam}
    if topk:
        wanted["topk_ids"] = targets[:, None].repeat(1, topk)
    if forward_kl or future_lam is not None:
        wanted["reference"] = (states.detach() * 0.9, weight.detach() * 1.1, None)

    def run() -> None:
        out = token_logprobs(states, weight, targets, chunk_tokens=chunk_tokens, **wanted)
        parts = [x.sum() for x in out if x is not None and x.requires_grad]
        torch.stack(parts).sum().backward()

    peak = peak_bytes(run, device)
    accumulator = weight.numel() * 4  # the weight's gradient while there are several chunks to add up
    of: dict[str, Any] = {"dtype": dtype, "device": device, "topk": topk}
    of["reference_hidden"] = hidden if "reference" in wanted else 0
    at_size = peak_extra_bytes(TOKENS, VOCAB, 3584, **of)
    return {
        "tokens": n,
        "vocab": vocab,
        "hidden": hidden,
        "entropy_grad": entropy_grad,
        "topk": topk,
        "forward_kl": forward_kl,
        "future": future_lam is not None,
        "peak_bytes": peak,
        "peak_without_weight_gradient": peak - accumulator,
        "computed_bytes": peak_extra_bytes(n, vocab, hidden, chunk_tokens, **of),
        "share_at_32768": _round(at_size / (TOKENS * VOCAB * 4)),
    }


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """Most bytes that the allocator had handed out at one time since the start of ``run``, temporaries inside
    operations included."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def on_gpu(hidden: int, repeats: int) -> dict[str, Any]:
    """bf16 at the full vocabulary: seconds for 4,096 tokens next to the naive head's, and the peak at 32,768 tokens."""
    head, plain = gpu_seconds(hidden, repeats)
    everything: dict[str, Any] = {"entropy_grad": True, "topk": TOPK, "forward_kl": True, "future_lam": 1.0}
    memory = measured(TOKENS, hidden=hidden, device="cuda", **everything)
    return {"head_s": _round(head), "naive_s": _round(plain), "ratio": _round(head / plain), "memory": memory}


def gpu_seconds(hidden: int, repeats: int) -> tuple[float, float]:
    """(best of the head, best of the naive head)."""
    states, weight, targets = inputs(4096, VOCAB, hidden, torch.bfloat16, "cuda")
    heads = (lambda: token_logprobs(states, weight, targets).logp, lambda: naive(states, weight, targets))
    seconds: list[list[float]] = [[], []]
    for i, which in product(range(repeats + 1), range(2)):
        torch.cuda.synchronize()
        start = time.perf_counter()
        torch.autograd.grad(heads[which]().sum(), (states, weight))
        torch.cuda.synchronize()
        if i > 0:
            seconds[which].append(time.perf_counter() - start)
    return min(seconds[0]), min(seconds[1])


def _round(x: float) -> float:
    """Four significant digits."""
    return x if x == 0 else round(x, 3 - math.floor(math.log10(abs(x))))


if __name__ == "__main__":
    main()
