"""Metrics against scikit-learn's, over any split of the samples."""

import re
import warnings
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn import metrics as sklearn

from protos import job_pb2
from protos.rules import check
from worker import metrics
from worker.errors import ModelFault
from worker.metrics import METRICS, MetricSums

SEEDS = st.integers(0, 2**32 - 1)
OF_LABELS = ("top_k_accuracy:2", "precision", "recall", "f1", "confusion_matrix")
OF_VALUES = ("root_mean_squared_error", "r2")
OF_BYTES = ("bits_per_byte",)


def asked(*words):
    """`f1`, `top_k_accuracy:2`: metrics of a resolved job."""
    messages = []
    for word in words:
        kind, _, k = word.partition(":")
        message = job_pb2.Metric()
        getattr(message, kind).SetInParent()
        if k:
            message.top_k_accuracy.k = int(k)
        messages.append(message)
    return messages


def counted(engine, words, loss, outputs, targets, parts):
    """The values over `parts` shares of the samples, as ranks and batches would cut them."""
    model = engine.build([f"dense:{outputs.shape[1]}"], loss, (2,)).model
    shares = [MetricSums(asked(*words), model, targets) for _ in range(parts)]
    for share, some, wanted in zip(shares, np.array_split(outputs, parts), np.array_split(targets, parts), strict=True):
        share.add(some, wanted)
    for share in shares[1:]:
        shares[0].sums += share.sums
    return shares[0].values()


def test_the_table_names_what_the_job_file_names_and_all_are_tested():
    assert list(METRICS) == [field.name for field in job_pb2.Metric.DESCRIPTOR.fields]
    assert {word.split(":")[0] for word in (*OF_LABELS, *OF_VALUES, *OF_BYTES)} == set(METRICS)


@settings(max_examples=40, deadline=None)
@given(samples=st.integers(1, 60), classes=st.integers(3, 6), parts=st.integers(1, 7), seed=SEEDS)
def test_metrics_of_labels_equal_scikit_learn_s_over_any_split(engine, samples, classes, parts, seed):
    random = np.random.default_rng(seed)
    outputs = random.standard_normal((samples, classes))
    labels = np.where(random.random(samples) < 0.5, outputs.argmax(axis=1), random.integers(0, classes, samples))
    predicted, every = outputs.argmax(axis=1), np.arange(classes)
    values = counted(engine, OF_LABELS, "softmax_cross_entropy", outputs, labels, parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class that does not occur has 0, which scikit-learn warns of
        assert values["top_2_accuracy"] == pytest.approx(
            sklearn.top_k_accuracy_score(labels, outputs, k=2, labels=every)
        )
        for name, peer in (
            ("precision", sklearn.precision_score),
            ("recall", sklearn.recall_score),
            ("f1", sklearn.f1_score),
        ):
            assert values[name] == pytest.approx(peer(labels, predicted, average="macro"), abs=1e-12)
            np.testing.assert_allclose(
                values[f"{name}_per_class"], peer(labels, predicted, labels=every, average=None), atol=1e-12
            )
    assert values["confusion_matrix"] == sklearn.confusion_matrix(labels, predicted, labels=every).tolist()


@settings(max_examples=15, deadline=None)
@given(samples=st.integers(1, 60), parts=st.integers(1, 7), offset=st.sampled_from([0.0, 1e4]), seed=SEEDS)
def test_bits_per_byte_are_the_logarithmic_loss_to_base_2_over_any_split(engine, samples, parts, offset, seed):
    random = np.random.default_rng(seed)
    outputs, labels = 3 * random.standard_normal((samples, 256)) + offset, random.integers(0, 256, samples)
    with patch.object(metrics, "BLOCK_ROWS", 7):
        values = counted(engine, OF_BYTES, "softmax_cross_entropy", outputs, labels, parts)
    peer = sklearn.log_loss(labels, softmax(outputs, axis=1), labels=np.arange(256)) / np.log(2)
    assert values == {"bits_per_byte": pytest.approx(peer, rel=1e-9)}


def test_bits_per_byte_of_a_model_of_something_else_are_refused(engine):
    message = "metrics[0].bits_per_byte: needs the 256 classes of bytes, and the model has 10: end with 256 units"
    with pytest.raises(ModelFault, match=re.escape(message)):
        counted(engine, OF_BYTES, "softmax_cross_entropy", np.zeros((4, 10)), np.zeros(4, np.int64), 1)


@settings(max_examples=30, deadline=None)
@given(samples=st.integers(2, 60), parts=st.integers(1, 7), seed=SEEDS)
def test_metrics_of_yes_or_no_equal_scikit_learn_s(engine, samples, parts, seed):
    random = np.random.default_rng(seed)
    outputs, wanted = random.standard_normal((samples, 1)), random.integers(0, 2, (samples, 1)).astype(np.float32)
    predicted, labels = (outputs > 0).astype(int).ravel(), wanted.astype(int).ravel()
    values = counted(engine, ["precision", "f1", "confusion_matrix"], "binary_cross_entropy", outputs, wanted, parts)
    assert values["precision_per_class"][1] == pytest.approx(
        sklearn.precision_score(labels, predicted, zero_division=0)
    )
    assert values["f1"] == pytest.approx(sklearn.f1_score(labels, predicted, average="macro", zero_division=0))
    assert values["confusion_matrix"] == sklearn.confusion_matrix(labels, predicted, labels=[0, 1]).tolist()


@settings(max_examples=30, deadline=None)
@given(
    samples=st.integers(2, 60),
    outputs=st.integers(1, 4),
    parts=st.integers(1, 7),
    offset=st.sampled_from([0.0, 1e6]),
    seed=SEEDS,
)
def test_metrics_of_values_equal_scikit_learn_s_also_far_from_zero(engine, samples, outputs, parts, offset, seed):
    random = np.random.default_rng(seed)
    wanted = random.standard_normal((samples, outputs)) + offset
    given_values = wanted + 0.3 * random.standard_normal(wanted.shape)
    values = counted(engine, OF_VALUES, "mean_squared_error", given_values, wanted, parts)
    assert values["root_mean_squared_error"] == pytest.approx(
        sklearn.root_mean_squared_error(wanted, given_values), rel=1e-9
    )
    assert values["r2"] == pytest.approx(sklearn.r2_score(wanted, given_values), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("error", [0.0, 0.5])
def test_r2_of_a_target_that_never_varies_is_scikit_learn_s(engine, error):
    wanted = np.full((4, 1), 2.0)
    values = counted(engine, ["r2"], "huber", wanted + error, wanted, 2)
    assert values["r2"] == sklearn.r2_score(wanted, wanted + error)


def test_among_equal_outputs_the_lower_class_comes_first(engine):
    values = counted(engine, ["top_k_accuracy:2"], "softmax_cross_entropy", np.zeros((4, 4)), np.arange(4), 1)
    assert values == {"top_2_accuracy": 0.5}


def test_evaluation_sees_the_outputs_before_the_loss_writes_over_them(engine):
    made = engine.build(["dense:4"], "softmax_cross_entropy", (3,))
    features, labels = engine.draw_batch(made.model, 9, 4)
    sums = MetricSums(asked("top_k_accuracy:1"), made.model, labels)
    totals = made.model.forward(features, labels, observe=sums.add)
    assert sums.values()["top_1_accuracy"] == totals.correct / 9


def test_what_does_not_fit_the_model_is_refused(engine):
    three = engine.build(["dense:3"], "softmax_cross_entropy", (2,)).model
    with pytest.raises(ModelFault, match=re.escape("metrics[1].top_k_accuracy.k: 5 is more than the 3 classes")):
        MetricSums(asked("f1", "top_k_accuracy:5"), three, np.zeros(1, np.int64))
    flags = engine.build(["dense:3"], "binary_cross_entropy", (2,)).model
    for unfit in ("top_k_accuracy:2", "confusion_matrix"):
        place = re.escape(f"metrics[1].{unfit.partition(':')[0]}: needs one label a sample")
        with pytest.raises(ModelFault, match=place + ".*takes precision, recall, f1"):
            MetricSums(asked("f1", unfit), flags, np.zeros((1, 3)))


@settings(max_examples=30, deadline=None)
@given(samples=st.integers(1, 40), outputs=st.integers(2, 5), parts=st.integers(1, 5), seed=st.integers(0, 1000))
def test_yes_or_no_outputs_are_counted_as_sklearn_counts_labels(engine, samples, outputs, parts, seed):
    random = np.random.default_rng(seed)
    logits = random.standard_normal((samples, outputs)) - np.linspace(0, 3, outputs)  # some outputs never say yes
    wanted = (random.random((samples, outputs)) < 0.3).astype(np.float32)
    values = counted(engine, ["precision", "recall", "f1"], "binary_cross_entropy", logits, wanted, parts)
    for name in ("precision", "recall", "f1"):
        score = getattr(sklearn, f"{name}_score")
        for average, ours in (("macro", values[name]), (None, values[f"{name}_per_class"])):
            theirs = score(wanted.astype(int), (logits > 0).astype(int), average=average, zero_division=0)
            np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_a_metric_that_has_no_meaning_for_the_loss_breaks_a_rule():
    job = job_pb2.JobSpec(metrics=asked("f1", "r2"))
    job.loss.huber.SetInParent()
    job.metrics[1].r2.SetInParent()
    said = [str(found) for found in check(job) if found.path == "metrics"]
    assert said == ["metrics: f1 cannot be told of values, which huber predicts; remove them"]
