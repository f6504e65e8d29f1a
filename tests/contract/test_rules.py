"""The rules of the schema: what is broken, what is filled in, and that the schema itself is one the walkers know."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from protos import job_pb2, rules
from protos.job_pb2 import JobSpec, Layer
from protos.labels import is_map

LAYERS = ", ".join(rules.option_words(rules.schema_of(Layer())))


def valid() -> JobSpec:
    spec = JobSpec()
    spec.data.train.built_in = "digits"
    spec.model.add().dense.units = 10
    spec.loss.softmax_cross_entropy.SetInParent()
    spec.optimizer.adam.SetInParent()
    return spec


def faults(spec: JobSpec) -> list[str]:
    return [str(violation) for violation in rules.check(spec)]


def test_a_valid_job_breaks_no_rule_resolved_or_not() -> None:
    assert faults(valid()) == []
    assert faults(rules.resolve(valid())) == []


def test_a_list_that_is_too_long_is_named_with_its_place() -> None:
    spec = valid()
    spec.model.insert(0, job_pb2.Layer(conv2d=job_pb2.Conv2dLayer(filters=2, kernel=[3, 3, 3], stride=[1, 1, 1, 1])))
    inside = spec.model.add().residual.layers.add().max_pool2d
    inside.size.extend([2, 2, 0])
    assert faults(spec) == [
        "model[0].conv2d.kernel: has 3 elements, which is not at most 2",
        "model[0].conv2d.stride: has 4 elements, which is not at most 2",
        f"model[{len(spec.model) - 1}].residual.layers[0].max_pool2d.size: has 3 elements, which is not at most 2",
        f"model[{len(spec.model) - 1}].residual.layers[0].max_pool2d.size[2]: 0 is not at least 1",
    ]


def test_an_empty_job_lacks_each_required_part_and_says_what_it_takes() -> None:
    assert faults(JobSpec()) == [
        "data: is required",
        f"model: is required: at least one of {LAYERS}",
        "loss: is required: one of mean_squared_error, softmax_cross_entropy, binary_cross_entropy, huber,"
        " mean_absolute_error",
        "optimizer: is required: one of sgd, momentum, adam, adamw, rmsprop, adagrad, lion, lamb",
    ]


def test_parts_that_name_no_option_list_what_is_allowed() -> None:
    spec = valid()
    spec.model.add()
    spec.data.train.Clear()
    spec.data.train.SetInParent()
    assert faults(spec) == [
        "data.train: names nothing; it takes one of: built_in, idx, npz, npy, csv, parquet, text",
        f"model[1]: names nothing; it takes one of: {LAYERS}",
    ]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("optimizer.adam.learning_rate", -1, "-1 is not above 0"),
        ("optimizer.adam.learning_rate", 0, "0 is not above 0"),
        ("optimizer.adam.learning_rate", math.nan, "nan is not a finite number"),
        ("optimizer.adam.learning_rate", math.inf, "inf is not a finite number"),
        ("optimizer.adam.beta1", 1, "1 is not below 1"),
        ("optimizer.adam.beta2", -0.25, "-0.25 is not at least 0"),
        ("data.validation_fraction", 1.5, "1.5 is not below 1"),
        ("data.train.built_in", "digit", "'digit' is not one of: digits; did you mean digits?"),
        ("training.epochs", 0, "0 is not at least 1"),
        ("training.seed", -1, "-1 is not at least 0"),
        ("sync.parameter_server.mode.bounded_staleness.steps", -1, "-1 is not at least 0"),
        ("workers", 4097, "4097 is not at most 4096"),
    ],
)
def test_a_value_out_of_bounds_is_named_with_its_path_the_value_and_the_bound(
    path: str, value: float | str, message: str
) -> None:
    spec = valid()
    *parents, name = path.split(".")
    holder = spec
    for parent in parents:
        holder = getattr(holder, parent)
    setattr(holder, name, value)
    assert faults(spec) == [f"{path}: {message}"]


def test_a_layer_is_named_by_its_place_in_the_list() -> None:
    spec = valid()
    spec.model.add().dense.SetInParent()
    spec.model.add().leaky_relu.alpha = 1
    assert faults(spec) == ["model[1].dense.units: is required", "model[2].leaky_relu.alpha: 1 is not below 1"]


@pytest.mark.parametrize(
    ("loss", "last", "refused"),
    [
        ("softmax_cross_entropy", "softmax", True),
        ("binary_cross_entropy", "sigmoid", True),
        ("binary_cross_entropy", "softmax", True),
        ("mean_squared_error", "softmax", False),
        ("mean_squared_error", "sigmoid", False),
        ("softmax_cross_entropy", "relu", False),
    ],
)
def test_a_loss_that_takes_logits_refuses_the_activation_it_holds_itself(loss: str, last: str, refused: bool) -> None:
    spec = valid()
    getattr(spec.loss, loss).SetInParent()
    getattr(spec.model.add(), last).SetInParent()
    expected = [f"loss.{loss}: takes logits: remove the {last} layer at model[1]"] if refused else []
    assert faults(spec) == expected


def test_softmax_between_layers_is_allowed() -> None:
    spec = valid()
    spec.model.insert(0, Layer())
    spec.model[0].softmax.SetInParent()
    assert faults(spec) == []


def test_validation_and_a_held_out_share_exclude_each_other() -> None:
    spec = valid()
    spec.data.validation.built_in = "digits"
    spec.data.validation_fraction = 0
    assert faults(spec) == []
    spec.data.validation_fraction = 0.2
    assert faults(spec) == ["data.validation_fraction: 0.2 is given beside `validation`; remove one of the two"]


def test_scale_and_standardize_exclude_each_other() -> None:
    spec = rules.resolve(valid())
    spec.data.standardize = True
    assert faults(spec) == []
    spec.data.scale = 0.5
    assert faults(spec) == ["data.scale: 0.5 is given beside `standardize`; remove one of the two"]


def test_every_fault_of_a_job_is_found_at_once() -> None:
    spec = valid()
    spec.optimizer.adam.learning_rate = -1
    spec.training.epochs = 0
    spec.workers = 0
    spec.data.scale = -2
    spec.model.add().softmax.SetInParent()
    assert [violation.path for violation in rules.check(spec)] == [
        "data.scale",
        "optimizer.adam.learning_rate",
        "training.epochs",
        "workers",
        "loss.softmax_cross_entropy",
    ]


def test_resolving_writes_the_defaults_in_and_leaves_the_argument_alone() -> None:
    spec = valid()
    before = spec.SerializeToString()
    resolved = rules.resolve(spec)
    assert spec.SerializeToString() == before
    assert resolved.name == "job"
    assert resolved.workers == 1
    assert (resolved.training.epochs, resolved.training.batch_size, resolved.training.seed) == (10, 32, 0)
    assert resolved.optimizer.adam.learning_rate == 0.001
    assert resolved.optimizer.adam.epsilon == 1e-8
    assert resolved.sync.WhichOneof("kind") == "all_reduce"
    assert resolved.data.HasField("standardize")
    assert not resolved.data.HasField("validation")
    assert rules.resolve(resolved) == resolved


def test_resolving_keeps_what_was_given() -> None:
    spec = valid()
    spec.sync.parameter_server.SetInParent()
    spec.training.batch_size = 0
    resolved = rules.resolve(spec)
    assert resolved.sync.parameter_server.mode.HasField("synchronous")
    assert resolved.training.batch_size == 0


@pytest.mark.parametrize("mode", ["bounded_staleness", "asynchronous"])
@pytest.mark.parametrize("needs", ["training.clip_norm", "optimizer.lamb"])
def test_what_needs_the_whole_vector_in_one_step_takes_the_synchronous_mode(mode: str, needs: str) -> None:
    spec = valid()
    getattr(spec.sync.parameter_server.mode, mode).SetInParent()
    if needs == "optimizer.lamb":
        spec.optimizer.lamb.learning_rate = 0.1
    else:
        spec.training.clip_norm = 1.0
    (violation,) = rules.check(spec)
    assert str(violation).startswith(f"sync.parameter_server.mode: {mode} is given beside {needs}, which needs")


def test_labels_are_words_that_need_no_quoting_and_each_fault_names_its_label() -> None:
    spec = valid()
    spec.labels.update({"team": "vision", "a b": "c", "for.whom": "every one", "empty": "", "long": "x" * 64})
    allowed = "1 to 63 letters, digits, `-`, `_` and `.`, a letter or digit at both ends"
    assert faults(spec) == [
        f"labels: the name 'a b' is not {allowed}",
        f"labels.empty: '' is not {allowed}",
        f"labels.for.whom: 'every one' is not {allowed}",
        f"labels.long: '{'x' * 57}...' is not {allowed}",
    ]
    spec.labels.clear()
    spec.labels.update({f"n{number}": "x" for number in range(33)})
    assert faults(spec) == ["labels: has 33 elements, which is not at most 32"]


def test_an_empty_sync_is_all_reduce() -> None:
    spec = valid()
    spec.sync.SetInParent()
    assert faults(spec) == []
    assert rules.resolve(spec).sync.WhichOneof("kind") == "all_reduce"


# --------------------------------------------------------------------------------------------------- the schema itself


def every_field(
    descriptor: Descriptor, path: str = "", above: tuple[Descriptor, ...] = ()
) -> Iterator[tuple[str, FieldDescriptor]]:
    """Each field once on every way down; layers hold layers, so a message beneath itself is not entered again."""
    for field in descriptor.fields:
        place = f"{path}.{field.name}" if path else field.name
        yield place, field
        if field.message_type is not None and field.message_type not in above and not is_map(field):
            yield from every_field(field.message_type, place, (*above, descriptor))


SCHEMA = dict(every_field(rules.schema_of(JobSpec())))


@pytest.mark.parametrize("path", SCHEMA)
def test_every_field_of_the_schema_is_of_a_kind_the_walkers_know(path: str) -> None:
    field = SCHEMA[path]
    rule = rules.rule_of(field)
    scalar = rules.INTEGERS | rules.FLOATS | {FieldDescriptor.CPPTYPE_BOOL, FieldDescriptor.CPPTYPE_STRING}
    if field.message_type is None:
        assert field.cpp_type in scalar
        assert not (rule.default and not field.has_presence), "a default needs `optional`: absent must differ from zero"
        # Outside an option, what is absent is either required or has a value: never a silent zero.
        real_option = field.containing_oneof is not None and field.containing_oneof.name != f"_{field.name}"
        # A file that need not be named is the exception: no file is no silent zero either.
        assert rule.required or rule.default or field.is_repeated or real_option or rule.path
    else:
        assert not is_map(field) or rule.label, "the walkers know maps of labels alone"
        assert not rule.default or rule.default in rules.option_words(field.message_type)


@pytest.mark.parametrize("path", [path for path, field in SCHEMA.items() if rules.rule_of(field).default])
def test_every_default_keeps_the_rule_it_stands_beside(path: str) -> None:
    field = SCHEMA[path]
    if field.message_type is None:
        message = field.containing_type._concrete_class()
        setattr(message, field.name, rules.default_value(field))
        named = [violation for violation in rules._message_violations(message, "") if violation.path == field.name]
        assert named == []


@pytest.mark.parametrize("inside", [False, True])
def test_pieces_of_a_batch_do_not_go_with_statistics_of_all_of_it(inside: bool) -> None:
    spec = valid()
    layers = spec.model.add().residual.layers if inside else spec.model
    layers.add().batch_norm.SetInParent()
    spec.training.micro_batch = 8
    assert faults(spec) == []
    layers.add().batch_norm.synchronized = True
    place = "model[1].residual.layers[1].batch_norm" if inside else "model[2].batch_norm"
    assert faults(spec) == [
        f"training.micro_batch: 8 is given beside {place}.synchronized, "
        "whose statistics are those of the whole batch at once; remove one of the two"
    ]


def test_reproducible_does_not_go_with_sums_in_the_middle_of_a_step() -> None:
    spec = valid()
    spec.training.reproducible = True
    spec.model.add().batch_norm.SetInParent()
    assert faults(spec) == []
    spec.model[-1].batch_norm.synchronized = True
    assert faults(spec) == [
        "model[1].batch_norm.synchronized: adds up statistics in the middle of a step, "
        "which `training.reproducible` rules out; remove one of the two"
    ]
    del spec.model[-1]
    spec.sync.local.SetInParent()
    assert faults(spec) == [
        "sync.local: gives other weights for each number of replicas, "
        "which `training.reproducible` rules out; remove one of the two"
    ]
    spec.sync.parameter_server.wire_format.int8.SetInParent()
    assert faults(spec) == [
        "sync.parameter_server.wire_format: rounds what each worker sends, "
        "which `training.reproducible` rules out; remove one of the two"
    ]


def test_reproducible_does_not_go_with_guests() -> None:
    spec = valid()
    spec.training.reproducible = True
    spec.sync.parameter_server.guests = True
    assert faults(spec) == [
        "sync.parameter_server.guests: shares a batch with whoever comes, "
        "which `training.reproducible` rules out; remove one of the two"
    ]


def test_guests_do_not_go_with_answers_that_say_how_weights_move() -> None:
    spec = valid()
    spec.sync.parameter_server.guests = True
    assert faults(spec) == []
    spec.sync.parameter_server.wire_format.int8.SetInParent()
    assert faults(spec) == [
        "sync.parameter_server.guests: true is given beside wire_format: int8, whose answers only those can read that "
        "hold the weights before; take float32 or no guests"
    ]


def test_virtual_shards_are_those_of_a_reproducible_job() -> None:
    spec = valid()
    spec.training.virtual_shards = 4
    assert faults(spec) == ["training.virtual_shards: 4 is given without `reproducible`; set that or remove this"]
    spec.training.reproducible = True
    assert faults(spec) == []
    assert faults(rules.resolve(valid())) == []


def test_local_steps_have_defaults_for_all_but_the_rate_of_plain_descent() -> None:
    spec = valid()
    spec.sync.local.SetInParent()
    local = rules.resolve(spec).sync.local
    assert (local.steps, local.replica, local.outer.WhichOneof("kind")) == (16, "node", "average")
    spec.sync.local.outer.nesterov.SetInParent()
    nesterov = rules.resolve(spec).sync.local.outer.nesterov
    assert (nesterov.learning_rate, nesterov.momentum) == (0.7, 0.9)
    spec.sync.local.outer.sgd.SetInParent()
    spec.sync.local.steps = 0
    spec.sync.local.replica = "host"
    assert faults(spec) == [
        "sync.local.steps: 0 is not at least 1",
        "sync.local.outer.sgd.learning_rate: is required",
        "sync.local.replica: 'host' is not one of: node, rank",
    ]


def test_local_steps_do_not_go_with_statistics_of_all_workers() -> None:
    spec = valid()
    spec.sync.local.SetInParent()
    spec.model.add().batch_norm.SetInParent()
    assert faults(spec) == []
    spec.model[1].batch_norm.synchronized = True
    assert faults(spec) == [
        "sync.local: is given beside model[1].batch_norm.synchronized, whose statistics all workers add up in every "
        "step; remove one of the two"
    ]
