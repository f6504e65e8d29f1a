"""Augmentation against a slow reference, image by image and pixel by pixel, and the same for every way to share it."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from protos import job_pb2
from worker.data import augmentation
from worker.data.augmentation import FLIPS, Augmentation, Augmenter, make_augmentation
from worker.data.batches import BatchReader
from worker.data.preprocessing import Preprocessing
from worker.data.sharding import share
from worker.data.sources import Dataset
from worker.errors import DataFault

RANDOM = np.random.default_rng(0)


def reference(image: NDArray[Any], what: Augmentation, epoch: int, index: int) -> NDArray[Any]:
    """One image (height, width, ...), by np.pad and slices."""
    moves = [int(values[0]) for values in what.moves(epoch, np.array([index]))]
    flip_rows, flip_columns, down, across, top, left = moves
    height, width = image.shape[:2]
    image = image[::-1] if flip_rows else image
    image = image[:, ::-1] if flip_columns else image
    others = [(0, 0)] * (image.ndim - 2)
    image = np.pad(image, [(what.shift, what.shift)] * 2 + others, mode="edge")
    image = image[down : down + height, across : across + width]
    image = np.pad(image, [(what.crop, what.crop)] * 2 + others)
    return image[top : top + height, left : left + width]


SHAPES = st.tuples(st.integers(2, 9), st.integers(2, 9)) | st.tuples(
    *[st.integers(2, 9)] * 2, st.sampled_from([1, 3, 8])
)


@settings(max_examples=100, deadline=None)
@given(st.data(), SHAPES, st.sampled_from(["u1", "i2", "f4", "f8", ">f4", "?"]))
def test_it_equals_the_reference(data: st.DataObject, shape: tuple[int, ...], stored: str) -> None:
    reach = st.integers(0, min(shape[:2]) - 1)
    what = Augmentation(
        data.draw(st.integers(0, 2**63 - 1)), *data.draw(st.sampled_from(list(FLIPS.values()))), data.draw(reach),
        data.draw(reach),
    )  # fmt: skip
    epoch = data.draw(st.integers(0, 10**6))
    indices = np.array(data.draw(st.lists(st.integers(0, 2**40), max_size=8)), np.int64)
    images = RANDOM.integers(0, 200, (len(indices), *shape)).astype(stored)
    expected = [reference(image, what, epoch, index) for image, index in zip(images, indices.tolist(), strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augmentation, "BLOCK_BYTES", data.draw(st.sampled_from([1, 500, 1 << 16])))
        Augmenter(what, shape, stored).apply(images, epoch, indices)
    np.testing.assert_array_equal(images, np.array(expected, stored).reshape(images.shape))


@pytest.mark.parametrize("stored", ["u1", "f4", "f8"])
@pytest.mark.parametrize("held_out", [False, True])
def test_ranks_and_pieces_see_what_one_rank_sees(stored: str, held_out: bool) -> None:
    images = RANDOM.integers(0, 256, (40, 8, 6, 3)).astype(stored)
    rows = RANDOM.permutation(40)[:30] if held_out else None
    dataset = Dataset(images, np.arange(40), rows, "here")
    what = Augmentation(7, False, True, 2, 3)
    order = RANDOM.permutation(30)

    def read(indices: NDArray[np.int64], capacity: int) -> NDArray[Any]:
        reader = BatchReader(dataset, Preprocessing(scale=0.5), capacity, augmentation=what)
        reader.begin_epoch(4)
        pieces = [reader.take(indices[i : i + capacity])[0].copy() for i in range(0, len(indices), capacity)]
        return np.concatenate(pieces)

    whole = read(order, 30)
    for ranks in (2, 3):
        shares = [share(0, 30, rank, ranks) for rank in range(ranks)]
        for capacity in (4, 30):
            again = np.concatenate([read(order[low:high], capacity) for low, high in shares])
            np.testing.assert_array_equal(again, whole)
    stored_images = images if rows is None else images[rows]
    expected = [reference(stored_images[index], what, 4, index) for index in order.tolist()]
    np.testing.assert_array_equal(whole, np.array(expected, np.float32) / 2)


def test_epochs_and_seeds_differ_and_all_moves_are_as_likely() -> None:
    indices = np.arange(20_000)
    what = Augmentation(1, True, True, 2, 4)
    moves = what.moves(0, indices)
    for flips in moves[:2]:
        assert abs(np.count_nonzero(flips) - 10_000) < 300  # 4 standard deviations
    for offsets, reach in zip(moves[2:], (2, 2, 4, 4), strict=True):
        counts = np.bincount(offsets, minlength=2 * reach + 1)
        assert len(counts) == 2 * reach + 1
        expected = 20_000 / len(counts)
        assert np.abs(counts - expected).max() < 5 * expected**0.5
    for other in (what.moves(1, indices), what._replace(seed=2).moves(0, indices)):
        for mine, theirs in zip(moves, other, strict=True):
            assert 0 < np.count_nonzero(mine == theirs) < 15_000
    for i, one in enumerate(moves):  # what happens one way says nothing of another
        for another in moves[i + 1 :]:
            assert abs(np.corrcoef(one, another)[0, 1]) < 0.03


def test_the_moves_of_a_seed_never_change() -> None:
    recorded = [[0, 1, 1], [0, 0, 0], [2, 5, 0], [1, 5, 1], [7, 2, 6], [5, 2, 8]]
    moves = Augmentation(5, True, True, 3, 4).moves(2, np.array([0, 1, 59_999]))
    assert [values.astype(int).tolist() for values in moves] == recorded


def test_a_job_that_asks_for_nothing_has_no_augmentation() -> None:
    assert make_augmentation(job_pb2.Data(), 1, (64,), "digits") is None


def test_a_job_that_asks_has_what_it_asks_for() -> None:
    data = job_pb2.Data(augment=job_pb2.Augment(flip="horizontal", shift=1, crop=2))
    assert make_augmentation(data, 9, (8, 8, 1), "digits") == Augmentation(9, False, True, 1, 2)


@pytest.mark.parametrize(
    ("augment", "shape", "message"),
    [
        (job_pb2.Augment(flip="vertical"), (64,), "x.npy: data.augment changes images, but samples have shape (64,)"),
        (job_pb2.Augment(crop=8), (8, 9, 3), "data.augment.crop: 8 pixels can leave nothing of an image of 8 x 9; "
                                             "ask for 7 at most"),
        (job_pb2.Augment(shift=9), (20, 9, 3), "data.augment.shift: 9 pixels can leave nothing"),
    ],
)  # fmt: skip
def test_what_samples_cannot_take_is_refused(augment: job_pb2.Augment, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(DataFault) as caught:
        make_augmentation(job_pb2.Data(augment=augment), 0, shape, "x.npy")
    assert message in str(caught.value)
