"""The command line. Exit codes: 0 done; 1 the run failed; 2 the command or the config is wrong and nothing was started."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.table import Table

from hapo_async import __version__, secrets
from hapo_async.errors import ConfigError, RunError, UserError
from hapo_async.files import parse_json, read_regular
from hapo_async.status import lines
from hapo_async.terminal import Terminal
from hapo_async.words import plural

app = typer.Typer(
    name="hapo-async",
    help="Asynchronous reinforcement learning from verifiable rewards.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out = Terminal(soft_wrap=True, highlight=False)
err = Terminal(stderr=True, soft_wrap=True, highlight=False)

Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, such as train.steps=10", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def main() -> None:
    """Entry point: turns errors into exit codes. Nothing that is printed or logged holds a secret."""
    with secrets.guarded():
        _main()


def _main() -> None:
    if not Path("/dev/nvidiactl").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for a GPU and warn that there is none
    logging.basicConfig(
        level=os.environ.get("HAPO_LOG", "WARNING").upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    for noisy in ("httpx", "transformers", "datasets"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        app()
    except UserError as error:
        err.print(f"error: {error}", style="red", markup=False)
        sys.exit(2)
    except RunError as error:
        err.print(f"run failed: {error}", style="red", markup=False)
        sys.exit(1)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file; the shipped ones are in configs/.")],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print what would run, start nothing.")
    ] = False,
) -> None:
    """Train a policy."""
    prepared = _prepare(config, overrides)
    if dry_run:
        from hapo_async import config as configs
        from hapo_async import plan

        out.print(configs.to_yaml(prepared.config), markup=False)
        for line in plan.describe(prepared.config, prepared.model_path, prepared.tokenizer, prepared.prompts[0]):
            out.print(line, markup=False)
        if prepared.algorithm.offline:
            from hapo_async.driver import offline as cached

            out.print(cached.preview(prepared), markup=False)
        return
    _train(prepared)


@app.command()
def offline(
    config: Annotated[Path, typer.Argument(help="A YAML file, such as configs/fpa_offline.yaml.")],
    overrides: Overrides = None,
    generate_only: Annotated[
        bool, typer.Option("--generate-only", help="Sample and judge the answers, then stop: no learner is started.")
    ] = False,
) -> None:
    """Sample answers once, then train on them: `train` for algorithms that learn offline."""
    prepared = _prepare(config, overrides)
    if not prepared.algorithm.offline:
        from hapo_async import algorithms

        known = ", ".join(name for name in algorithms.names() if algorithms.get(name).offline)
        raise ConfigError(
            f"algorithm={prepared.algorithm.name!r} samples while it trains. Use `hapo-async train`, or one of: {known}."
        )
    if not generate_only:
        _train(prepared)
        return
    from hapo_async.driver import offline as cached

    folder = cached.generate_only(prepared, lambda text: out.print(text, markup=False))
    out.print(f"answers      {folder}", markup=False)


def _prepare(config: Path, overrides: list[str] | None) -> Any:
    from hapo_async import config as configs

    loaded = configs.load(config, overrides or [])
    from hapo_async.driver import setup

    prepared = setup.prepare(loaded)
    for report in prepared.reports.values():
        out.print(report.text(), markup=False)
    return prepared


def _train(prepared: Any) -> None:
    from hapo_async.driver import run

    outcome = run.train(prepared)
    _print_outcome(outcome, run.outcome_rows(outcome))
    if not outcome.finished:
        raise RunError(
            f"stopped by a signal after step {outcome.steps}; the same command continues from its checkpoint"
        )


def _print_outcome(outcome: Any, rows: list[tuple[str, float | None, float]]) -> None:
    out.print(f"\n{plural(outcome.steps, 'step')} in {outcome.seconds:.0f} s")
    if not outcome.seconds:
        out.print("the run was complete already: nothing was trained")
    if outcome.note:
        out.print(f"stopped early: {outcome.note}", markup=False)
    for name, before, after in rows:
        start = f"{before:.3f} -> " if before is not None else ""
        out.print(f"held-out accuracy on {name} (pass@1): {start}{after:.3f}")
    out.print(f"report       {outcome.run_dir / 'report.html'}", markup=False)
    out.print(f"TensorBoard  tensorboard --logdir {outcome.run_dir / 'tensorboard'}", markup=False)
    out.print(f"model        {outcome.run_dir / 'model'}", markup=False)


@app.command("eval")
def evaluate_model(
    model: Annotated[str, typer.Argument(help="A folder, a Hugging Face id, or builtin:chain.")],
    data: Annotated[list[str], typer.Option("--data", help="A file or data set; repeat for several.")],
    n: Annotated[int | None, typer.Option(help="Answers per prompt; 1, or what the protocol says.")] = None,
    k: Annotated[int | None, typer.Option(help="Largest k of pass@k.")] = None,
    protocol: Annotated[str, typer.Option(help="Evaluate as a seed paper does: 000 | 001 | 002 | 003 | 004.")] = "",
    bootstrap: Annotated[int | None, typer.Option(help="Draws of bootstrap pass@k; 0 for none.", min=0)] = None,
    save: Annotated[Path | None, typer.Option(help="Keep all answers in this JSONL file.")] = None,
    analyses: Annotated[bool, typer.Option("--analyses", help="Also oracle coverage and diversity.")] = False,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Evaluate a model on benchmark files."""
    from hapo_async import config as configs
    from hapo_async.evaluation import evaluate, protocols

    preset = protocols.get(protocol) if protocol else None
    names = [evaluate.set_name(source) for source in data]

    def load(name: str) -> configs.Config:
        own = protocols.overrides(preset, name, n, k)
        return configs.load(None, [f"model={model}", *own, *(overrides or [])])

    loaded = load(names[0])
    loaded = loaded.model_copy(update={"data": loaded.data.model_copy(update={"eval": data})})
    chosen = configs.overridden(overrides or []).get("eval") or {}
    given = {*chosen, *(chosen.get("sampling") or {}), *(["n"] if n else [])}
    for note in protocols.notes(preset, names, given) if preset else ():
        err.print(f"note: {note}", markup=False)
    from hapo_async.driver import standalone

    draws = bootstrap if bootstrap is not None else preset.bootstrap if preset else 0
    metrics = standalone.evaluate_model(loaded, lambda name: load(name).eval, draws, save, analyses)
    if as_json:
        out.print_json(json.dumps(metrics))
        return
    table = Table("set", "metric", "value", "± se")
    for name, value in metrics.items():
        if not name.endswith("/se"):
            _, where, what = name.split("/", 2)
            error = metrics.get(f"{name}/se")
            table.add_row(where, what, f"{value:.4g}", "" if error is None else f"{error:.3f}")
    out.print(table)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="A run folder, or a file that `eval --save` wrote.")],
    b: Annotated[str, typer.Argument(help="Another one.")],
    as_json: Json = False,
    html: Annotated[Path | None, typer.Option(help="Also write the comparison as one self-contained page.")] = None,
) -> None:
    """Compare two runs: metrics at equal steps, questions that only one of them solves."""
    from hapo_async.report import compare as comparing

    found = comparing.compare(Path(a), Path(b))
    if html:
        comparing.write(found, html)
    if as_json:
        out.print_json(json.dumps(found.as_dict()))
        return
    for block in found.blocks():
        out.print(block, markup=False)


@app.command()
def explain(
    algorithm: Annotated[str | None, typer.Argument(help="A name; without one, all are listed.")] = None,
    other: Annotated[str | None, typer.Argument(help="Another name: print what the two do differently.")] = None,
    as_json: Json = False,
) -> None:
    """Print what an algorithm is made of, from the code; with two names, their difference; without any, all."""
    from hapo_async import algorithms
    from hapo_async import explain as explaining

    found = [explaining.find(name) for name in (algorithm, other) if name]
    if as_json:
        everything = found or [algorithms.get(name).describe() for name in algorithms.names()]
        tree = explaining.difference(*found) if other else everything[0] if algorithm else everything
        out.print_json(json.dumps(tree))
    elif other:
        out.print(explaining.difference_text(*found), markup=False)
    elif algorithm:
        out.print(explaining.page(found[0]), markup=False)
    else:
        out.print(explaining.overview(), markup=False)
        out.print(
            "`hapo-async explain NAME` prints the parts, the equation and the options of one; `explain A B` their difference."
        )


@app.command()
def status(run: Annotated[Path, typer.Argument(help="A run folder.")], as_json: Json = False) -> None:
    """What a run is doing: version, ledger, generators, bottleneck."""
    path = run / "status.json"
    if not path.exists():
        raise ConfigError(f"{str(path)!r} does not exist: {str(run)!r} is not the folder of a run that has started.")
    try:
        state = parse_json(read_regular(path, 16 << 20))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error}.") from None
    if state["state"] == "running" and not psutil.pid_exists(state["pid"]):
        state["state"] = f"dead: its driver (pid {state['pid']}) is gone; the same command continues it"
    if as_json:
        out.print_json(json.dumps(state))
        return
    if "step" not in state:
        answers = state["answers"]
        out.print(f"{state['state']}: answers to {answers['done']} of {plural(answers['of'], 'prompt')}")
        out.print(answers["folder"], markup=False)
        return
    for line in lines(state):
        out.print(line, markup=False, highlight=False)


@app.command()
def scale(
    run: Annotated[Path, typer.Argument(help="The folder of a run that is going on.")],
    wanted: Annotated[list[str], typer.Argument(help="generators=N, verifiers=M or both.", show_default=False)],
    drain_deadline: Annotated[
        float,
        typer.Option(help="Seconds that one which leaves has for what it is sampling; the rest goes on elsewhere."),
    ] = 60.0,
    wait: Annotated[float, typer.Option(help="Seconds until what has not been achieved is given up.")] = 600.0,
) -> None:
    """Change the number of generators and verifiers of a live run."""
    from hapo_async import control

    request = control.new_request(wanted, drain_deadline, wait)
    control.submit(run, request)
    control.follow(run, request, lambda line: out.print(line, markup=False))


@app.command("check-data")
def check_data(config: Path, overrides: Overrides = None, as_json: Json = False) -> None:
    """Load a config's data, print the column mapping and what was left out and why."""
    from hapo_async import config as configs
    from hapo_async import data

    reports = data.check_data(configs.load(config, overrides or []))
    if as_json:
        out.print_json(json.dumps([report.as_dict() for report in reports]))
        return
    for report in reports:
        out.print(report.text(), markup=False)


@app.command("check-verifier")
def check_verifier(
    file: Path,
    verifier: Annotated[str, typer.Option("--verifier", help="auto | boxed | math | module:function")] = "auto",
    workers: Annotated[int, typer.Option(help="Worker processes.")] = 2,
    as_json: Json = False,
) -> None:
    """Judge a file of labelled answers and list where the verifier disagrees with the labels."""
    from hapo_async.verify import check

    report = check.check_verifier(str(file), name=verifier, workers=workers)
    if as_json:
        out.print_json(json.dumps(report.as_dict()))
    else:
        out.print(report.text(), markup=False)


@app.command()
def version() -> None:
    """Print the version."""
    out.print(__version__)
