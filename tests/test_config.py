"""The configuration refuses what cannot run and says how to mend it."""

import pytest

from hapo_async import config
from hapo_async.errors import ConfigError


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as info:
        config.load(None, overrides)
    return str(info.value)


def test_overrides_reach_nested_keys_and_keep_their_types():
    c = config.load(None, ["learner.lr=1e-4", "train.steps=7", "data.eval=[a.jsonl, b.json]", "gate.mode=never"])
    assert (c.learner.lr, c.train.steps, c.data.eval, c.gate.mode) == (1e-4, 7, ["a.jsonl", "b.json"], "never")


def test_the_bare_word_off_is_not_a_boolean(tmp_path):
    assert config.load(None, ["staleness.correction=off", "max_staleness=2"]).correction.name == "off"
    path = tmp_path / "c.yaml"
    path.write_text("staleness:\n  correction: off\n")
    assert config.load(path).staleness.correction == "off"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.yaml.*does not exist"):
        config.load(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("gate.gama=1", "gate.gamma"),
        ("learner.learning_rate=1", "learner"),
        ("stepz=3", "train.steps"),
        ("lr=1", "learner.lr"),
        ("eval.temperature=1", "'eval.sampling.temperature'"),
        ("eval.max_tokens=1", "'eval.sampling.max_tokens'"),
        ("learner.weight_decay=1", "'learner.adamw.weight_decay'"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(override, nearest):
    message = refused(override)
    assert "unknown key" in message
    if nearest != "learner":
        assert nearest in message


def test_a_batch_that_the_ranks_cannot_share_is_refused():
    message = refused("train.batch_prompts=16", "learner.ranks=3")
    assert "not divisible" in message and "learner.ranks=3" in message and "multiple of 3" in message


def test_a_batch_that_does_not_split_into_updates_is_refused():
    assert "mini_batches" in refused("train.batch_prompts=16", "learner.mini_batches=3")


def test_wrong_types_and_ranges_name_the_key_and_the_value():
    assert "learner.lr" in refused("learner.lr=-1")
    assert "'fast'" in refused("generator.engine=fast")
    assert "section" in refused("train=3")


def test_yaml_that_is_not_a_mapping_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match="key: value"):
        config.load(path)
    path.write_text("a: [")
    with pytest.raises(ConfigError, match="not YAML"):
        config.load(path)


def test_pass_at_k_needs_k_answers():
    assert "eval.k=4" in refused("eval.k=4")


def test_the_resolved_config_loads_again_to_the_same_thing(tmp_path):
    first = config.load(None, ["learner.adamw.betas=[0.8, 0.99]", "run.dir=x"])
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(first))
    second = config.load(path)
    assert second == first and second.digest() == first.digest()


def test_the_run_folder_is_named_after_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 3\n")
    assert config.load(path).run.dir == "runs/mine"
    assert config.load(path, ["run.dir=elsewhere"]).run.dir == "elsewhere"


def test_the_surface_stays_small():
    keys = config.known_keys()
    assert len(keys) <= 80, f"{len(keys)} keys"
    assert len(keys) == len(set(keys))


def test_every_key_says_what_it_is():
    def walk(model):
        for name, info in model.model_fields.items():
            sub = config.section_of(info.annotation)
            if sub:
                walk(sub)
            else:
                assert info.description, name

    walk(config.Config)


def test_settings_of_the_flow_that_contradict_each_other_are_refused_with_the_fix():
    assert "max_staleness=4" in refused("staleness.force_lag=4")
    assert "max_staleness=0" in refused("generator.placement=colocated", "max_staleness=1")
    assert "generator.count=1" in refused("eval.mode=detached", "max_staleness=1")
    assert "max_staleness=0" in refused("eval.mode=floating", "max_staleness=0")
    assert "force_lag=2" in refused("eval.mode=floating", "max_staleness=2", "staleness.force_lag=2")
    taking_turns = ("generator.placement=colocated", "max_staleness=0")
    for transport in ("gloo", "nccl"):
        assert "weights.transport=auto" in refused(f"weights.transport={transport}", *taking_turns)
    config.load(None, ["weights.transport=ipc", *taking_turns])


@pytest.mark.parametrize(
    "overrides, mode",
    [
        ([], "barrier"),
        (["generator.count=2"], "detached"),
        (["generator.count=2", "max_staleness=0"], "barrier"),
        (["generator.count=2", "max_staleness=2", "staleness.force_lag=2"], "barrier"),
        (["generator.count=3", "eval.mode=barrier"], "barrier"),
        (["eval.mode=floating"], "floating"),
    ],
)
def test_an_evaluation_goes_on_beside_training_where_it_can(overrides, mode):
    assert config.load(None, ["max_staleness=1", *overrides]).evaluation_mode == mode


def test_small_tables_are_completed_and_checked():
    c = config.load(None, ["learner.adamw.eps=1e-6", "run.alarms={canary_every: 0}"])
    assert c.learner.adamw == {"betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.0}
    assert c.run.alarms == {"silence_s": 30.0, "canary_every": 0, "mismatch_kl": 0.01}
    assert "Did you mean 'betas'" in refused("learner.adamw.beta=[0.9, 0.99]")
    assert "two numbers" in refused("learner.adamw.betas=[0.9]")
    assert "silence_s=0" in refused("run.alarms.silence_s=0")


def test_how_held_out_answers_are_sampled_is_one_table():
    c = config.load(None, ["eval.sampling.temperature=1", "eval.n=4"])
    assert c.eval.sampling == {"temperature": 1.0, "top_p": 1.0, "max_tokens": 0}
    assert (c.eval.temperature, c.eval.top_p, c.eval.max_tokens) == (1.0, 1.0, 0)
    assert "eval.sampling.temperature=0" in refused("eval.n=4")
    assert "top_p=1.5" in refused("eval.sampling.top_p=1.5") and "top_p=0" in refused("eval.sampling.top_p=0")


def test_an_adapter_is_off_until_something_of_it_is_set():
    assert config.load(None).learner.lora == {}
    c = config.load(None, ["learner.lora.rank=4"])
    assert c.learner.lora == {"rank": 4, "alpha": 16.0, "targets": "auto", "dropout": 0.0}
    assert config.load(None, ["learner.lora={targets: [q_proj]}"]).learner.lora["targets"] == ["q_proj"]
    assert "rank=0" in refused("learner.lora.rank=0") and "alpha=0" in refused("learner.lora.alpha=0")
    assert "below 1" in refused("learner.lora.dropout=1") and "Did you mean 'rank'" in refused("learner.lora.ranks=8")
    assert "list of names" in refused("learner.lora.targets=q_proj")
    assert "list of names" in refused("learner.lora.targets=[]")


@pytest.mark.parametrize(
    ("overrides", "on_cpu", "on_gpu"),
    [
        ([], ("ray", "host"), ("nccl", "device")),
        (["generator.placement=colocated", "max_staleness=0"], ("ray", "host"), ("ipc", "device")),
        (["weights.transport=zmq"], ("zmq", "host"), ("zmq", "host")),
        (["weights.transport=ipc", "weights.staging=none"], ("ipc", "none"), ("ipc", "none")),
        (["weights.transport=gloo", "weights.staging=device"], ("gloo", "device"), ("gloo", "device")),
    ],
)
def test_weights_travel_as_the_devices_allow(overrides, on_cpu, on_gpu):
    c = config.load(None, overrides)
    assert (c.transport(False), c.staging(False)) == on_cpu
    assert (c.transport(True), c.staging(True)) == on_gpu
