"""What a job may say: fills in defaults and names every violation.

Rules of this file:
- Bounds, defaults and allowed words stand in job.proto, on the field itself (options.proto); the code here walks the
  descriptor and knows no field by name. A new layer or optimizer brings its rules along and nothing here changes.
- What one field demands of another is a row of CROSS_FIELD_RULES.
- Nothing stops at the first fault, reads a file or changes its argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor, OneofDescriptor
from google.protobuf.message import Message

from protos import options_pb2
from protos.job_pb2 import JobSpec, Layer
from protos.labels import LABEL_RULE, is_label, is_map
from protos.wording import not_one_of, number, quoted

INTEGERS = frozenset(getattr(FieldDescriptor, f"CPPTYPE_{name}") for name in ("INT32", "INT64", "UINT32", "UINT64"))
FLOATS = frozenset({FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT})


class Violation(NamedTuple):
    """One fault of a job: where it stands in the file, and what was given against what is allowed."""

    path: str  # as in the file: `model[2].dense.units`
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


def check(spec: JobSpec) -> list[Violation]:
    """Every violation in the job, fields first, in the order of the schema; an absent field with a default is none."""
    return [*_message_violations(spec, ""), *(found for rule in CROSS_FIELD_RULES if (found := rule(spec)))]


def resolve(spec: JobSpec) -> JobSpec:
    """A copy with every default written in, so that the job means the same under later versions' defaults.

    A part that is absent is created where all it holds has defaults (`training`), an option left open where the
    schema names one (`sync`). What is required stays absent: `check` names it.
    """
    resolved = JobSpec()
    resolved.CopyFrom(spec)
    _fill_in(resolved)
    return resolved


# ------------------------------------------------------------------------------------------------ reading the schema


def rule_of(field: FieldDescriptor) -> options_pb2.Rule:
    """The rule written on a field; an empty one where there is none."""
    extension: Any = options_pb2.rule  # the generated stub leaves out what the extension holds
    return cast(options_pb2.Rule, field.GetOptions().Extensions[extension])


def schema_of(message: Message) -> Descriptor:
    """The descriptor of a message, by the name of its public type."""
    return cast(Descriptor, message.DESCRIPTOR)


def choice_of(descriptor: Descriptor) -> OneofDescriptor | None:
    """The oneof whose options a job file names by word, or None. `optional` fields hide a oneof each: not those."""
    for oneof in descriptor.oneofs:
        if oneof.name != f"_{oneof.fields[0].name}":
            return oneof
    return None


def option_words(descriptor: Descriptor) -> list[str]:
    """The words of the options, in the order of the schema; empty where the message has no oneof."""
    choice = choice_of(descriptor)
    return [field.name for field in choice.fields] if choice else []


def chosen_option(message: Message) -> str | None:
    """The word of the option a message holds, None where it names none or has no options."""
    choice = choice_of(schema_of(message))
    return message.WhichOneof(choice.name) if choice else None


def hint_of(descriptor: Descriptor, word: str) -> str:
    """What the schema has to say of a word that the message does not know; nothing of most."""
    extension: Any = options_pb2.hint
    return next((hint.said for hint in descriptor.GetOptions().Extensions[extension] if hint.word == word), "")


# -------------------------------------------------------------------------------------------------------- violations


def _message_violations(message: Message, path: str) -> Iterator[Violation]:
    for field in schema_of(message).fields:
        place = f"{path}.{field.name}" if path else field.name
        yield from _field_violations(message, field, place)


def _field_violations(message: Message, field: FieldDescriptor, place: str) -> Iterator[Violation]:
    rule = rule_of(field)
    value = getattr(message, field.name)
    if is_map(field):
        given = [(text, f"{place}.{name}") for name, text in sorted(value.items()) if is_label(name)]
        unfit = (quoted(name) for name in sorted(value) if not is_label(name))
        yield from (Violation(place, f"the name {name} is not {LABEL_RULE}") for name in unfit)
    elif field.is_repeated:
        given = [(element, f"{place}[{index}]") for index, element in enumerate(value)]
    elif message.HasField(field.name) if field.has_presence else bool(value):
        given = [(value, place)]
    else:
        given = []
    if rule.required and not given:
        yield Violation(place, f"is required{_what_it_takes(field)}")
    if rule.longest and field.is_repeated and len(value) > rule.longest:
        yield Violation(place, f"has {len(value)} elements, which is not at most {rule.longest}")
    for element, element_place in given:
        if field.message_type is None or is_map(field):
            yield from (Violation(element_place, fault) for fault in _value_faults(element, rule))
        else:
            yield from _choice_violations(element, element_place, rule)
            yield from _message_violations(element, element_place)


def _what_it_takes(field: FieldDescriptor) -> str:
    words = option_words(field.message_type) if field.message_type else []
    number_wanted = "at least one of" if field.is_repeated else "one of"
    return f": {number_wanted} {', '.join(words)}" if words else ""


def _choice_violations(message: Message, place: str, rule: options_pb2.Rule) -> Iterator[Violation]:
    words = option_words(schema_of(message))
    if words and not chosen_option(message) and not rule.default:
        yield Violation(place, f"names nothing; it takes one of: {', '.join(words)}")


def _value_faults(value: float | str | bool, rule: options_pb2.Rule) -> Iterator[str]:
    if isinstance(value, str):
        if rule.label and not is_label(value):
            yield f"{quoted(value)} is not {LABEL_RULE}"
        if rule.one_of and value not in rule.one_of:
            yield not_one_of(value, rule.one_of)
        return
    if not math.isfinite(value):
        yield f"{value} is not a finite number"
        return
    if rule.HasField("above") and not value > rule.above:
        yield f"{number(value)} is not above {number(rule.above)}"
    if rule.HasField("at_least") and not value >= rule.at_least:
        yield f"{number(value)} is not at least {number(rule.at_least)}"
    if rule.HasField("below") and not value < rule.below:
        yield f"{number(value)} is not below {number(rule.below)}"
    if rule.HasField("at_most") and not value <= rule.at_most:
        yield f"{number(value)} is not at most {number(rule.at_most)}"


# ------------------------------------------------------------------------------------------------- cross-field rules


def _one_held_out_set(spec: JobSpec) -> Violation | None:
    if not (spec.data.HasField("validation") and spec.data.validation_fraction):
        return None
    given = number(spec.data.validation_fraction)
    return Violation("data.validation_fraction", f"{given} is given beside `validation`; remove one of the two")


def _one_preprocessing(spec: JobSpec) -> Violation | None:
    if not (spec.data.standardize and spec.data.HasField("scale") and spec.data.scale != 1):
        return None
    return Violation("data.scale", f"{number(spec.data.scale)} is given beside `standardize`; remove one of the two")


def _bytes_stay_whole(spec: JobSpec) -> Violation | None:
    why = "is given beside `text`, whose features are the numbers of bytes; remove it"
    if chosen_option(spec.data.train) != "text":
        return None
    if spec.data.standardize:
        return Violation("data.standardize", why)
    if spec.data.HasField("scale") and spec.data.scale != 1:
        return Violation("data.scale", f"{number(spec.data.scale)} {why}")
    return None


# These losses hold the last activation themselves, where it can be computed without overflow.
TAKES_LOGITS = {
    "softmax_cross_entropy": ("softmax",),
    "binary_cross_entropy": ("sigmoid", "softmax"),
}


def _logits_for_the_loss(spec: JobSpec) -> Violation | None:
    loss = chosen_option(spec.loss)
    last = chosen_option(spec.model[-1]) if spec.model else None
    if loss is None or last not in TAKES_LOGITS.get(loss, ()):
        return None
    return Violation(f"loss.{loss}", f"takes logits: remove the {last} layer at model[{len(spec.model) - 1}]")


def _losses_to_watch(spec: JobSpec) -> Violation | None:
    if _has_validation(spec):
        return None
    watching = {
        "schedule.reduce_on_plateau": spec.schedule.HasField("reduce_on_plateau"),
        "training.early_stopping": spec.training.HasField("early_stopping"),
        "training.keep_best": spec.training.keep_best,
    }
    return next((Violation(path, NEEDS_VALIDATION) for path, given in watching.items() if given), None)


NEEDS_VALIDATION = "needs a validation loss: give data.validation or data.validation_fraction"


def _has_validation(spec: JobSpec) -> bool:
    return spec.data.HasField("validation") or spec.data.validation_fraction > 0


def _one_clipping(spec: JobSpec) -> Violation | None:
    if not (spec.training.clip_norm and spec.training.clip_value):
        return None
    given = number(spec.training.clip_value)
    return Violation("training.clip_value", f"{given} is given beside `clip_norm`; remove one of the two")


def _pieces_beside_synchronized(spec: JobSpec) -> Violation | None:
    place = _synchronized_layer(spec.model, "model")
    if not (spec.training.micro_batch and place):
        return None
    beside = f"{number(spec.training.micro_batch)} is given beside {place}.synchronized"
    why = "whose statistics are those of the whole batch at once"
    return Violation("training.micro_batch", f"{beside}, {why}; remove one of the two")


def _local_beside_synchronized(spec: JobSpec) -> Violation | None:
    place = _synchronized_layer(spec.model, "model")
    if not (spec.sync.HasField("local") and place):
        return None
    beside = f"{place}.synchronized, whose statistics all workers add up in every step"
    return Violation("sync.local", f"is given beside {beside}; remove one of the two")


def _synchronized_layer(layers: Iterable[Layer], path: str) -> str | None:
    """The path of the first layer that is synchronized over the workers."""
    for index, layer in enumerate(layers):
        kind = chosen_option(layer)
        place = f"{path}[{index}].{kind}"
        if kind and getattr(getattr(layer, kind), "synchronized", False):
            return place
        if layer.HasField("residual") and (inside := _synchronized_layer(layer.residual.layers, f"{place}.layers")):
            return inside
    return None


def _reproducible_alone(spec: JobSpec) -> Violation | None:
    """What `reproducible` cannot be had with, by the path of what is in its way."""
    if not spec.training.reproducible:
        return None
    layer = _synchronized_layer(spec.model, "model")
    in_the_way = {
        f"{layer}.synchronized": (layer, "adds up statistics in the middle of a step"),
        "sync.local": (spec.sync.HasField("local"), "gives other weights for each number of replicas"),
        "sync.all_reduce.wire_format": (
            chosen_option(spec.sync.all_reduce.wire_format) not in (None, "float32"),
            "rounds what each node sends",
        ),
        "sync.parameter_server.mode": (
            chosen_option(spec.sync.parameter_server.mode) not in (None, "synchronous"),
            "applies gradients in the order in which they come",
        ),
        "sync.parameter_server.guests": (spec.sync.parameter_server.guests, "shares a batch with whoever comes"),
        "sync.parameter_server.wire_format": (
            chosen_option(spec.sync.parameter_server.wire_format) not in (None, "float32"),
            "rounds what each worker sends",
        ),
    }
    for place, (given, why) in in_the_way.items():
        if given:
            return Violation(place, f"{why}, which `training.reproducible` rules out; remove one of the two")
    return None


def _shards_of_reproducible(spec: JobSpec) -> Violation | None:
    given = spec.training.virtual_shards
    default = default_value(schema_of(spec.training).fields_by_name["virtual_shards"])
    if spec.training.reproducible or given in (0, default):
        return None
    return Violation("training.virtual_shards", f"{given} is given without `reproducible`; set that or remove this")


def _whole_vector_in_one_step(spec: JobSpec) -> Violation | None:
    mode = chosen_option(spec.sync.parameter_server.mode)
    lamb = "optimizer.lamb" if chosen_option(spec.optimizer) == "lamb" else ""
    needs = "training.clip_norm" if spec.training.clip_norm else lamb
    if mode in (None, "synchronous") or not needs:
        return None
    told = f"{mode} is given beside {needs}, which needs all workers' gradients at once"
    return Violation("sync.parameter_server.mode", f"{told}; take synchronous or remove the other")


def _no_factors_for_servers(spec: JobSpec) -> Violation | None:
    if chosen_option(spec.sync.parameter_server.wire_format) != "power_sgd":
        return None
    return Violation(
        "sync.parameter_server.wire_format",
        "power_sgd is for all_reduce, since its factors are sums over all nodes; take int8 or another one here",
    )


def _guests_hold_weights(spec: JobSpec) -> Violation | None:
    given = chosen_option(spec.sync.parameter_server.wire_format)
    if not spec.sync.parameter_server.guests or given in (None, "float32"):
        return None
    told = f"true is given beside wire_format: {given}, whose answers only those can read that hold the weights before"
    return Violation("sync.parameter_server.guests", f"{told}; take float32 or no guests")


OF_VALUES = ("root_mean_squared_error", "r2")  # the other metrics count labels
PREDICTS_LABELS = ("softmax_cross_entropy", "binary_cross_entropy")


def _metrics_for_the_loss(spec: JobSpec) -> Violation | None:
    loss = chosen_option(spec.loss)
    asked = [kind for metric in spec.metrics if (kind := chosen_option(metric))]
    unfit = [kind for kind in asked if (kind in OF_VALUES) == (loss in PREDICTS_LABELS)]
    if loss is None or not unfit:
        return None
    predicts = "labels" if loss in PREDICTS_LABELS else "values"
    return Violation("metrics", f"{', '.join(unfit)} cannot be told of {predicts}, which {loss} predicts; remove them")


CROSS_FIELD_RULES: tuple[Callable[[JobSpec], Violation | None], ...] = (
    _one_held_out_set,
    _one_preprocessing,
    _bytes_stay_whole,
    _logits_for_the_loss,
    _losses_to_watch,
    _one_clipping,
    _pieces_beside_synchronized,
    _reproducible_alone,
    _shards_of_reproducible,
    _whole_vector_in_one_step,
    _guests_hold_weights,
    _no_factors_for_servers,
    _local_beside_synchronized,
    _metrics_for_the_loss,
)


# ---------------------------------------------------------------------------------------------------------- defaults


def _fill_in(message: Message) -> None:
    for field in schema_of(message).fields:
        rule = rule_of(field)
        if is_map(field):
            continue
        if field.message_type is None:
            if rule.default and not message.HasField(field.name):
                setattr(message, field.name, default_value(field))
        elif field.is_repeated:
            for element in getattr(message, field.name):
                _fill_in(element)
        elif message.HasField(field.name) or _makes_itself(field):
            part = getattr(message, field.name)
            part.SetInParent()
            if rule.default and not chosen_option(part):
                getattr(part, rule.default).SetInParent()
            _fill_in(part)


def default_value(field: FieldDescriptor) -> float | str | bool:
    """The default of a scalar field, in the field's own type."""
    text = rule_of(field).default
    if field.cpp_type in INTEGERS:
        return int(text)
    if field.cpp_type in FLOATS:
        return float(text)
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return {"true": True, "false": False}[text]
    return text


def _makes_itself(field: FieldDescriptor) -> bool:
    """Whether an absent part is created: its option has a default, or it has none and no field of it is needed."""
    if field.containing_oneof or rule_of(field).required:
        return False
    if rule_of(field).default:
        return True
    part = field.message_type
    return part is not None and choice_of(part) is None and all(map(_may_be_left_out, part.fields))


def _may_be_left_out(field: FieldDescriptor) -> bool:
    """Whether it has a default, or is a part whose absence means something."""
    return bool(rule_of(field).default) or (field.message_type is not None and not rule_of(field).required)
