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
from rich.console import Console
from rich.table import Table

from hapo_async import __version__
from hapo_async.errors import ConfigError, RunError, UserError

app = typer.Typer(
    name="hapo-async",
    help="Asynchronous reinforcement learning from verifiable rewards.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)

Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, such as train.steps=10", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def main() -> None:
    """Entry point: turns errors into exit codes."""
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
    from hapo_async import config as configs

    loaded = configs.load(config, overrides or [])
    from hapo_async.driver import setup

    prepared = setup.prepare(loaded)
    for report in prepared.reports.values():
        out.print(report.text(), markup=False)
    if dry_run:
        from hapo_async import plan

        out.print(configs.to_yaml(loaded), markup=False)
        for line in plan.describe(prepared.config, prepared.model_path, prepared.tokenizer, prepared.prompts[0]):
            out.print(line, markup=False)
        return
    from hapo_async.driver import run

    outcome = run.train(prepared)
    _print_outcome(outcome, run.outcome_rows(outcome))
    if not outcome.finished:
        raise RunError(
            f"stopped by a signal after step {outcome.steps}; the same command continues from its checkpoint"
        )


def _print_outcome(outcome: Any, rows: list[tuple[str, float | None, float]]) -> None:
    out.print(f"\n{outcome.steps} steps in {outcome.seconds:.0f} s")
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
    n: Annotated[int, typer.Option(help="Answers per prompt.")] = 1,
    k: Annotated[int, typer.Option(help="k of pass@k.")] = 1,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Evaluate a model on benchmark files."""
    from hapo_async import config as configs

    temperature = [] if n == 1 else ["eval.temperature=1.0"]
    tree = [f"model={model}", f"eval.n={n}", f"eval.k={k}", *temperature, *(overrides or [])]
    loaded = configs.load(None, tree)
    loaded = loaded.model_copy(update={"data": loaded.data.model_copy(update={"eval": data})})
    from hapo_async.driver import standalone

    metrics = standalone.evaluate_model(loaded)
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
def explain(algorithm: Annotated[str | None, typer.Argument()] = None, as_json: Json = False) -> None:
    """Print what an algorithm is made of, from the code; without a name, list all."""
    from hapo_async import algorithms

    algorithm = algorithm.lower().replace("+", "_").replace(".", "_") if algorithm else None
    names = [algorithm] if algorithm else algorithms.names()
    parts = {name: algorithms.get(name).describe() for name in names}
    if as_json:
        out.print_json(json.dumps(parts[algorithm] if algorithm else list(parts.values())))
        return
    if algorithm is None:
        table = Table("algorithm", "what it is", "advantage", "trains on", "reduction")
        for name, p in parts.items():
            table.add_row(
                name, p["title"], p["advantage"].split(":")[0], p["composition"], p["reduction"].split(":")[0]
            )
        out.print(table)
        out.print("`hapo-async explain NAME` prints the parts, the equation and the options of one.")
        return
    for key, value in parts[algorithm].items():
        out.print(f"[bold]{key:>12}[/]  ", end="")
        out.print(json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value, markup=False)


@app.command()
def status(run: Annotated[Path, typer.Argument(help="A run folder.")], as_json: Json = False) -> None:
    """What a run is doing: version, ledger, generators, bottleneck."""
    path = run / "status.json"
    if not path.exists():
        raise ConfigError(f"{str(path)!r} does not exist: {str(run)!r} is not the folder of a run that has started.")
    state = json.loads(path.read_text())
    if state["state"] == "running" and not psutil.pid_exists(state["pid"]):
        state["state"] = f"dead: its driver (pid {state['pid']}) is gone; the same command continues it"
    if as_json:
        out.print_json(json.dumps(state))
        return
    out.print(f"{state['state']}: step {state['step']} of {state['steps']}, version {state['version']}")
    out.print("ledger: " + ", ".join(f"{k} {v}" for k, v in state["ledger"].items()))
    for g in state["generators"]:
        out.print(f"{g['name']}: {g['state']}, serves {g['version']}, {g['groups']} groups")
    if state["advice"]:
        out.print(state["advice"], markup=False)


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
