"""Which jobs a coordinator takes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor

from coordinator.admission import NotAllowed, too_large, violations_of
from protos import job_pb2
from protos.job_file import JobFileInvalid, parse_job, to_yaml
from protos.rules import rule_of


def job(path: str, workers: int = 1) -> job_pb2.JobSpec:
    spec = parse_job(
        "{data: {train: {csv: {path: /placeholder, target: y}}}, model: [{dense: {units: 1}}],"
        " loss: mean_squared_error, optimizer: sgd}"
    )
    spec.workers = workers
    spec.data.train.csv.path = path
    return spec


def test_any_absolute_path_is_taken_where_no_root_is_set() -> None:
    assert violations_of(job("/anywhere/data.csv"), (), 2) == []


def test_a_relative_path_names_no_folder_the_coordinator_knows() -> None:
    (fault,) = violations_of(job("data.csv"), (), 2)
    assert fault.path == "data.train.csv.path"
    assert "'data.csv' is not absolute" in fault.message


def test_more_ranks_than_slots_are_refused_with_both_remedies() -> None:
    (fault,) = violations_of(job("/data.csv", workers=5), (), 2)
    assert str(fault) == (
        "workers: 5 is more than this coordinator's 2 slots; start it with --slots 5 or ask for 2 at most"
    )


def test_the_file_of_initial_weights_is_confined_like_data(tmp_path: Path) -> None:
    spec = job(str(tmp_path / "data.csv"))
    spec.initialize_from = "/etc/weights.safetensors"
    assert [fault.path for fault in violations_of(spec, (tmp_path.resolve(),), 2)] == ["initialize_from"]


def test_every_fault_is_named_at_once() -> None:
    spec = job("data.csv", workers=5)
    spec.optimizer.sgd.learning_rate = -1
    assert [fault.path for fault in violations_of(spec, (), 2)] == [
        "optimizer.sgd.learning_rate",
        "data.train.csv.path",
        "workers",
    ]


@pytest.mark.parametrize(
    ("given", "allowed"),
    [
        ("root/data.csv", True),
        ("root/below/not-there.csv", True),
        ("root/inner-link/data.csv", True),
        ("elsewhere/data.csv", False),
        ("root/../elsewhere/data.csv", False),
        ("root/link/data.csv", False),
        ("rooted/data.csv", False),
        ("root/loop/data.csv", False),
    ],
)
def test_a_path_is_judged_by_where_it_leads(tmp_path: Path, given: str, allowed: bool) -> None:
    for folder in ("root/below", "elsewhere", "rooted"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "root/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/inner-link").symlink_to(tmp_path / "root/below")
    (tmp_path / "root/loop").symlink_to(tmp_path / "root/loop")
    faults = violations_of(job(str(tmp_path / given)), ((tmp_path / "root").resolve(),), 2)
    assert [fault.path for fault in faults] == ([] if allowed else ["data.train.csv.path"])


def test_a_refused_path_names_the_roots_there_are() -> None:
    (fault,) = violations_of(job("/etc/passwd"), (Path("/data"), Path("/more")), 2)
    assert "'/etc/passwd' is not under a folder this coordinator may read from: /data, /more" in fault.message


def test_a_nul_in_a_path_is_no_path() -> None:
    (fault,) = violations_of(job("/data\0.csv"), (Path("/data"),), 2)
    assert "is not a path" in fault.message


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("s3://bucket/data/x.csv", True),
        ("s3://bucket/data/below/x.csv", True),
        ("s3://bucket/database/x.csv", False),
        ("s3://bucket/data/../x.csv", False),
        ("s3://bucket/data/%2e%2E/x.csv", False),
        ("s3://other/data/x.csv", False),
        ("file:///data/x.csv", False),
        ("https://bucket/data/x.csv", False),
    ],
)
def test_a_url_must_lie_under_a_root_that_is_one(url: str, allowed: bool) -> None:
    faults = violations_of(job(url), (Path("/data"), "s3://bucket/data/"), 2)
    assert [(fault.path, type(fault)) for fault in faults] == ([] if allowed else [("data.train.csv.path", NotAllowed)])


def test_any_url_is_taken_where_no_root_is_set() -> None:
    assert violations_of(job("s3://bucket/x.csv"), (), 2) == []


def test_a_path_is_not_under_a_root_that_is_a_url() -> None:
    (fault,) = violations_of(job("/data/x.csv"), ("s3://bucket",), 2)
    assert isinstance(fault, NotAllowed)


def test_a_refused_url_is_named_without_its_secrets() -> None:
    (fault,) = violations_of(job("https://someone:secret@host/x.csv?signature=secret"), ("s3://bucket",), 2)
    assert "'https://host/x.csv' is not under a folder" in fault.message
    assert "secret" not in fault.message


@pytest.mark.parametrize("scheme", ["file", "local", "ssh", "sftp", "zip", "simplecache", "memory", "github"])
def test_a_scheme_that_is_no_stores_is_taken_where_a_root_names_it_and_nowhere_else(scheme: str) -> None:
    (fault,) = violations_of(job(f"{scheme}://data/x.csv"), (), 2)
    assert isinstance(fault, NotAllowed)
    assert "is of no scheme that this coordinator lets jobs read from: s3, " in fault.message
    assert violations_of(job(f"{scheme}://data/x.csv"), (f"{scheme}://data",), 2) == []


def paths_of(descriptor: Descriptor, place: str = "") -> Iterator[str]:
    """Every field of a message that is a path, by rule."""
    for field in descriptor.fields:
        here = f"{place}.{field.name}" if place else field.name
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            if here.count(".") < 6:  # layers may hold layers
                yield from paths_of(field.message_type, here)
        elif rule_of(field).path:
            yield here


def test_every_path_of_a_job_file_is_confined_and_none_of_them_is_written(tmp_path: Path) -> None:
    """What a job writes is named by the coordinator alone: the file has no field for it, nor for a command."""
    places = set(paths_of(job_pb2.JobSpec.DESCRIPTOR))
    sources = {f"data.{part}.{rest}" for part in ("train", "validation") for rest in SOURCE_PATHS}
    assert places == sources | {"initialize_from"}
    for place in places:
        spec = job_pb2.JobSpec()
        *folders, name = place.split(".")
        message = spec
        for folder in folders:
            message = getattr(message, folder)
        setattr(message, name, "/etc/passwd")
        faults = [fault for fault in violations_of(spec, (tmp_path.resolve(),), 2) if isinstance(fault, NotAllowed)]
        assert [fault.path for fault in faults] == [place]


SOURCE_PATHS = (
    *("idx.images", "idx.labels", "npz.path", "npy.features", "npy.targets"),
    *("csv.path", "parquet.path", "text.path"),
)


@pytest.mark.parametrize("levels", range(1, 15))
def test_a_job_is_nested_too_deeply_where_its_workers_could_not_read_its_file(levels: int) -> None:
    spec = job("/data.csv")
    layers = spec.model
    for _ in range(levels):
        layers = layers.add().residual.layers
    layers.add().leaky_relu.alpha = 0.5
    faults = too_large(spec)
    assert bool(faults) == (levels > 9)
    if faults:
        assert str(faults[0]) == "job file: is nested more than 32 deep"
        with pytest.raises(JobFileInvalid, match="is nested more than 32 deep"):
            parse_job(to_yaml(spec))
    else:
        parse_job(to_yaml(spec))


@pytest.mark.parametrize("count", [3000, 9000])
def test_a_job_holds_too_many_values_where_its_workers_could_not_read_its_file(count: int) -> None:
    spec = job("/data.csv")
    for _ in range(count):
        spec.model.add().leaky_relu.alpha = 0.5
    assert bool(too_large(spec)) == (count == 9000)
    if count == 9000:
        with pytest.raises(JobFileInvalid, match="holds more than 20000 values"):
            parse_job(to_yaml(spec))
