"""Job files as people write them: what they mean, what `--set` changes, and what is said of their faults."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from protos.job_file import JobFileInvalid, parse_job, read_job_file, to_dict, to_yaml
from protos.job_pb2 import JobSpec

EXAMPLES = Path(__file__).parents[2] / "examples"

MINIMAL = """
data: {train: {built_in: digits}}
model: [dense: {units: 10}]
loss: softmax_cross_entropy
optimizer: adam
"""


def faults(text: str, settings: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(JobFileInvalid) as caught:
        parse_job(text, settings)
    assert str(caught.value) == "\n".join(map(str, caught.value.violations))
    return str(caught.value).splitlines()


def minimal_with(line: str) -> str:
    """MINIMAL with the line of the same key replaced, or added."""
    key = line.split(":")[0]
    kept = [given for given in MINIMAL.strip().splitlines() if not given.startswith(f"{key}:")]
    return "\n".join([*kept, line])


# ------------------------------------------------------------------------------------------------------- what is meant


def test_the_example_of_the_contract_means_what_it_says() -> None:
    spec = read_job_file(EXAMPLES / "fashion_mnist.yaml")
    assert spec.name == "fashion-mlp"
    assert spec.data.train.idx.images == "/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz"
    assert spec.data.validation.idx.labels == "/usr/share/datasets/fashion-mnist/t10k-labels-idx1-ubyte.gz"
    assert spec.data.scale == 1 / 255
    assert [layer.WhichOneof("kind") for layer in spec.model] == ["dense", "relu", "dense"]
    assert [spec.model[0].dense.units, spec.model[2].dense.units] == [256, 10]
    assert spec.loss.WhichOneof("kind") == "softmax_cross_entropy"
    assert spec.optimizer.adam.learning_rate == 0.001
    assert (spec.training.epochs, spec.training.batch_size, spec.training.seed) == (3, 256, 1)
    assert spec.sync.WhichOneof("kind") == "all_reduce"
    assert spec.workers == 2


@pytest.mark.parametrize(
    ("written", "kind"),
    [("bfloat16", "bfloat16"), ("top_k", "top_k"), ("{top_k: {fraction: 0.1}}", "top_k"), ("power_sgd", "power_sgd")],
)
def test_a_wire_format_is_a_word_or_has_options(written: str, kind: str) -> None:
    spec = parse_job(minimal_with(f"sync: {{all_reduce: {{wire_format: {written}}}}}"))
    wire_format = spec.sync.all_reduce.wire_format
    assert wire_format.WhichOneof("kind") == kind
    assert wire_format.top_k.fraction in (0, 0.01, 0.1)
    assert wire_format.power_sgd.rank == (4 if kind == "power_sgd" else 0)


def test_a_wire_format_that_is_none_or_out_of_bounds_is_refused() -> None:
    def faults_of(written: str) -> str:
        return "".join(faults(minimal_with(f"sync: {{all_reduce: {{wire_format: {written}}}}}")))

    assert "sync.all_reduce.wire_format" in faults_of("int4")
    assert "did you mean int8?" in faults_of("int4")
    place = "sync.all_reduce.wire_format.top_k.fraction: "
    assert faults_of("{top_k: {fraction: 0.6}}") == place + "0.6 is not at most 0.5"
    assert faults_of("{top_k: {fraction: 0}}") == place + "0 is not above 0"


def test_parameter_servers_take_every_wire_format_but_power_sgd() -> None:
    def parameter_server(settings: str) -> str:
        return minimal_with(f"sync: {{parameter_server: {settings}}}")

    for kind in ("float32", "float16", "bfloat16", "int8", "top_k", "sign"):
        spec = parse_job(parameter_server(f"{{wire_format: {kind}}}"))
        assert spec.sync.parameter_server.wire_format.WhichOneof("kind") == kind
    assert parse_job(parameter_server("{servers: 2}")).sync.parameter_server.wire_format.HasField("float32")
    assert faults(parameter_server("{wire_format: power_sgd}")) == [
        "sync.parameter_server.wire_format: power_sgd is for all_reduce, since its factors are sums over all nodes; "
        "take int8 or another one here"
    ]


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.glob("*.yaml")))
def test_every_example_is_valid_and_reads_back_as_written(example: str) -> None:
    spec = read_job_file(EXAMPLES / example)
    assert parse_job(to_yaml(spec)) == spec


def test_the_parameter_server_example_differs_in_name_and_exchange_alone() -> None:
    by_server = read_job_file(EXAMPLES / "fashion_mnist_parameter_server.yaml")
    assert by_server.sync.WhichOneof("kind") == "parameter_server"
    all_reduce = read_job_file(EXAMPLES / "fashion_mnist.yaml")
    by_server.name = all_reduce.name
    by_server.sync.CopyFrom(all_reduce.sync)
    assert by_server == all_reduce


@pytest.mark.parametrize(
    "optimizer", ["adam", "{adam: }", "{adam: {}}", "{adam: null}", "{adam: {beta1: 0.9}}", "\n  adam:\n    beta1: .9"]
)
def test_a_bare_word_stands_for_the_option_with_its_defaults(optimizer: str) -> None:
    assert parse_job(minimal_with(f"optimizer: {optimizer}")) == parse_job(MINIMAL)


@pytest.mark.parametrize("rate", ["1e-3", "0.001", "1E-3", "+.001", "1.0e-3", '"0.001"'])
def test_a_number_may_be_written_in_any_usual_way(rate: str) -> None:
    spec = parse_job(minimal_with(f"optimizer: {{sgd: {{learning_rate: {rate}}}}}"))
    assert spec.optimizer.sgd.learning_rate == 0.001


@pytest.mark.parametrize("epochs", ["3", "3.0", "3e0", "+3"])
def test_a_whole_number_may_be_written_as_a_float(epochs: str) -> None:
    assert parse_job(minimal_with(f"training: {{epochs: {epochs}}}")).training.epochs == 3


def test_a_seed_keeps_all_its_63_bits() -> None:
    assert parse_job(minimal_with(f"training: {{seed: {2**63 - 1}}}")).training.seed == 2**63 - 1


@pytest.mark.parametrize("name", ["no", "2024", "1e-3", "2024-01-01", "true"])
def test_a_text_field_takes_what_is_written_whatever_it_looks_like(name: str) -> None:
    spec = parse_job(minimal_with(f"name: {name}"))
    assert spec.name == name
    assert parse_job(to_yaml(spec)) == spec


def test_empty_parts_take_their_defaults() -> None:
    assert parse_job(MINIMAL + "training:\nsync:\nname: ~\n") == parse_job(MINIMAL)


def test_json_is_the_same_thing() -> None:
    spec = read_job_file(EXAMPLES / "digits.yaml")
    for indent in (None, 2, "\t"):
        assert parse_job(json.dumps(to_dict(spec), indent=indent)) == spec


def test_aliases_may_repeat_a_part() -> None:
    text = minimal_with("model: [&hidden {dense: {units: 4}}, *hidden, {dense: {units: 10}}]")
    assert [layer.dense.units for layer in parse_job(text).model] == [4, 4, 10]


def test_one_number_stands_for_a_list_of_one() -> None:
    text = minimal_with("model: [conv2d: {filters: 4, kernel: 3, stride: [2, 1]}]")
    assert [[*layer.conv2d.kernel, *layer.conv2d.stride] for layer in parse_job(text).model] == [[3, 2, 1]]
    assert parse_job(to_yaml(parse_job(text))) == parse_job(text)
    with pytest.raises(JobFileInvalid, match=re.escape("model[0].conv2d.kernel[0]: 'big' is not a whole number")):
        parse_job(minimal_with("model: [conv2d: {filters: 4, kernel: big}]"))


def test_the_resolved_job_reads_like_a_job_file() -> None:
    text = to_yaml(parse_job(MINIMAL))
    assert "- dense: {units: 10, bias: true}\n" in text
    assert "loss:\n  softmax_cross_entropy: {label_smoothing: 0.0}\n" in text
    assert "sync:\n  all_reduce: {shared_memory: true, wire_format: float32}\n" in text
    assert "schedule:\n  constant: {}\n  warm_up_epochs: 0.0\n" in text
    assert "training: {epochs: 10, batch_size: 32, seed: 0, keep_checkpoints: 2" in text


def test_an_unresolved_job_is_written_resolved() -> None:
    spec = JobSpec()
    spec.data.train.built_in = "digits"
    spec.model.add().dense.units = 10
    spec.loss.softmax_cross_entropy.SetInParent()
    spec.optimizer.adam.SetInParent()
    assert parse_job(to_yaml(spec)) == parse_job(MINIMAL)


def test_relative_data_paths_are_taken_from_the_folder_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tmp_path / "jobs" / "job.yaml"
    job.parent.mkdir()
    text = minimal_with("data: {train: {npz: {path: data/x.npz}}, validation: {npy: {features: /a/x.npy, targets: y}}}")
    job.write_text(text)
    monkeypatch.chdir(tmp_path)
    data = read_job_file(Path("jobs/job.yaml")).data
    assert data.train.npz.path == str(tmp_path / "jobs" / "data" / "x.npz")
    assert data.train.npz.features == "x"  # the name of an array, not a path
    assert data.validation.npy.features == "/a/x.npy"
    assert data.validation.npy.targets == str(tmp_path / "jobs" / "y")
    assert parse_job(text).data.train.npz.path == "data/x.npz"


def test_a_url_in_place_of_a_path_is_left_as_it_is(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(minimal_with("data: {train: {npz: {path: 's3://bucket/x.npz'}}}"))
    assert read_job_file(job).data.train.npz.path == "s3://bucket/x.npz"


# ------------------------------------------------------------------------------------------------------------- `--set`


@pytest.mark.parametrize(
    ("setting", "path", "value"),
    [
        ("training.epochs=5", "training.epochs", 5),
        ("name=try 2", "name", "try 2"),
        ("name=42", "name", "42"),
        ("model.0.dense.units=64", "model.0.dense.units", 64),
        ("model[0].dense.units=64", "model.0.dense.units", 64),
        ("optimizer.adam.learning_rate=1e-2", "optimizer.adam.learning_rate", 0.01),
        ("optimizer=sgd", "optimizer.sgd.learning_rate", 0.01),
        ("optimizer={sgd: {learning_rate: 0.5}}", "optimizer.sgd.learning_rate", 0.5),
        ("sync.parameter_server.servers=1", "sync.parameter_server.servers", 1),
        ("data.standardize=true", "data.standardize", True),
        ("model[0]={dense: {units: 3}}", "model.0.dense.units", 3),
    ],
)
def test_a_setting_is_laid_over_the_file(setting: str, path: str, value: object) -> None:
    found: object = parse_job(MINIMAL, [setting])
    for step in path.split("."):
        found = found[int(step)] if step.isdecimal() else getattr(found, step)  # type: ignore[index]
    assert found == value


def test_of_two_settings_the_later_wins() -> None:
    spec = parse_job(MINIMAL, ["optimizer=sgd", "optimizer.sgd.learning_rate=1", "optimizer.sgd.learning_rate=2"])
    assert spec.optimizer.sgd.learning_rate == 2


@pytest.mark.parametrize(
    ("setting", "fault"),
    [
        ("training.epoch=5", "training.epoch: is unknown; known here: epochs, .*; did you mean epochs?"),
        ("training.epochs.x=5", "training.epochs: holds a mapping where a whole number is expected"),
        ("model[3].dense.units=5", re.escape("model[3]: --set reaches past model, which has 1 entries")),
        ("model.relu=5", re.escape("model[relu]: --set reaches past model, which has 1 entries")),
        ("training.epochs", "--set training.epochs: is not of the form training.epochs=5 or .*"),
        ("=5", "--set =5: is not of the form .*"),
        ("name=[", r"--set name=\[: line 1, column 2: .*"),
        ("workers=none", "workers: 'none' is not a whole number"),
        ("optimizer.sgd.learning_rate=1", "optimizer: names sgd and adam; it takes one of: .*"),
    ],
)
def test_a_setting_that_does_not_fit_is_a_violation(setting: str, fault: str) -> None:
    (found,) = faults(MINIMAL, (setting,))
    assert re.fullmatch(fault.replace("?", r"\?"), found)


# -------------------------------------------------------------------------------------------------------------- faults


def test_five_faults_are_reported_at_once_each_with_its_path() -> None:
    text = """
    data: {train: {built_in: digits}}
    model:
      - dense: {units: many}
      - relu
      - dense: {unit: 10}
      - softmax
    loss: softmax_cross_entropy
    optimizer: {adam: {learning_rate: -1}}
    training: {epochs: 3.5}
    """
    assert faults(text) == [
        "model[0].dense.units: 'many' is not a whole number",
        "model[2].dense.unit: is unknown; known here: units, bias; did you mean units?",
        "training.epochs: 3.5 is not a whole number",
        "optimizer.adam.learning_rate: -1 is not above 0",
        "loss.softmax_cross_entropy: takes logits: remove the softmax layer at model[3]",
    ]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("nmae: x", "nmae: is unknown; known here: name, data, model, .*; did you mean name?"),
        ("batchSize: 3", "batchSize: is unknown; known here: .*"),
        ("metrics: [accuracy]", "metrics[0]: 'accuracy' is not one of: .*; it is always reported beside the loss: .*"),
        ("metrics: [rmse]", "metrics[0]: 'rmse' is not one of: .*; did you mean root_mean_squared_error?"),
        ("metrics: [{rmse: {}}]", "metrics[0].rmse: is unknown; .*; did you mean root_mean_squared_error?"),
        ("optimizer: adm", "optimizer: 'adm' is not one of: sgd, .*, lamb; did you mean adam?"),
        ("optimizer: {adm: {}}", "optimizer.adm: is unknown; known here: sgd, .*; did you mean adam?"),
        ("optimizer: [adam]", "optimizer: holds a list where a mapping of these is expected: sgd, .*"),
        ("optimizer: {}", "optimizer: names nothing; it takes one of: sgd, .*, lamb"),
        ("model: dense", "model: holds a word where a list is expected"),
        ("model: []", "model: is required: at least one of dense, .*"),
        ("model: [dense]", "model[0].dense.units: is required"),
        ("model: [dense: 5]", "model[0].dense: holds a word where a mapping of these is expected: units, bias"),
        ("model: [relu: {alpha: 1}]", "model[0].relu.alpha: is unknown; known here: nothing, it has no settings"),
        ("data: digits", "data: holds a word where a mapping of these is expected: train, .*"),
        ("data: {train: built_in}", "data.train.built_in: needs a value, one of: digits"),
        ("data: {train: {csv: {path: x}}}", "data.train.csv.target: is required"),
        ("data: {train: {csv: {path: '', target: y}}}", "data.train.csv.path: is required"),
        ("workers: 1.5", "workers: 1.5 is not a whole number"),
        ("workers: true", "workers: 'true' is not a whole number"),
        ("workers: 9999999999", "workers: 9999999999 is not at most 2147483647"),
        ("workers: -9999999999", "workers: -9999999999 is not at least -2147483648"),
        ("workers: .nan", "workers: .nan is not a finite number"),
        ("workers: 1e999", "workers: 1e999 is not a finite number"),
        ("workers: [2]", "workers: holds a list where a whole number is expected"),
        ("training: {seed: 9223372036854775808}", "training.seed: 9223372036854775808 is not at most .*"),
        ("optimizer: {sgd: {learning_rate: fast}}", "optimizer.sgd.learning_rate: 'fast' is not a number"),
        ("optimizer: {sgd: {learning_rate: -.inf}}", "optimizer.sgd.learning_rate: -.inf is not a finite number"),
        ("optimizer: {momentum: {nesterov: 1}}", "optimizer.momentum.nesterov: '1' is not true or false"),
        ("sync: {parameter_server: {servers: 65}}", "sync.parameter_server.servers: 65 is not at most 64"),
        ('name: "\\ud800"', "name: '.*' holds half of a character .*"),
        ("<<: {name: x}", "'<<': is unknown; known here: .*"),
    ],
)
def test_a_fault_is_named_once_with_its_path_and_what_is_allowed(line: str, fault: str) -> None:
    (found,) = faults(minimal_with(line))
    pattern = "".join(".*" if part == ".*" else re.escape(part) for part in re.split(r"(\.\*)", fault))
    assert re.fullmatch(pattern, found)


def test_shared_memory_can_be_switched_off_and_is_on_by_default() -> None:
    off = parse_job(MINIMAL + "sync: {all_reduce: {shared_memory: off}}\n")
    assert off.sync.all_reduce.shared_memory is False
    assert parse_job(to_yaml(off)) == off
    assert parse_job(MINIMAL).sync.all_reduce.shared_memory is True
