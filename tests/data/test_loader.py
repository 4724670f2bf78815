"""The loader against a list that is cut by hand, at many worlds; the ranks are loaders in one process, in lockstep."""

from __future__ import annotations

import json
import logging
import multiprocessing
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler, IterableDataset, TensorDataset, get_worker_info

from shardline.data import Loader, Position
from shardline.data.order import permutation
from shardline.errors import DataError, UsageError

WORLDS = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2), (8, 1), (8, 2)]  # (world size, accumulation)


class Numbers(IterableDataset):  # type: ignore[type-arg]
    """A stream of 0, 1, 2, ... that splits itself by worker, as torch's documentation shows it."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        return iter(range(self.length) if info is None else range(info.id, self.length, info.num_workers))


class Noisy:
    """Samples that show which random numbers they were drawn with."""

    def __len__(self) -> int:
        return 37

    def __getitem__(self, index: int) -> tuple[int, float, float, torch.Tensor]:
        return index, random.random(), float(np.random.rand()), torch.randn(2)


class NoisyStream(IterableDataset):  # type: ignore[type-arg]
    """A stream that shuffles itself in a buffer, with random numbers, and adds noise."""

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        buffer = list(range(8))
        for coming in range(8, 37):
            place = random.randrange(8)
            yield buffer[place], torch.randn(2)
            buffer[place] = coming
        yield from ((index, torch.randn(2)) for index in buffer)


def loaders(dataset: Any, world_size: int, accumulation: int, **settings: Any) -> list[Loader]:
    settings = {"global_batch": 12, "seed": 5} | settings
    micro_batch = -(-settings["global_batch"] // (world_size * accumulation))
    return [
        Loader(
            dataset, micro_batch=micro_batch, accumulation=accumulation, rank=rank, world_size=world_size, **settings
        )
        for rank in range(world_size)
    ]


def run(ranks: list[Loader], windows: int | None = None) -> list[list[Any]]:
    """Real samples of each global batch to the end of the epoch, or for some windows, from all ranks in lockstep."""
    accumulation = ranks[0]._state.split.accumulation
    steps = zip(*ranks, strict=True)  # strict: all ranks end together
    batches: list[list[Any]] = []
    for step, parts in enumerate(islice(steps, windows and windows * accumulation)):
        if step % accumulation == 0:
            batches.append([])
        for rank, part in zip(ranks, parts, strict=True):
            batches[-1] += unbatched(part)[: rank.samples]
    return batches


def unbatched(batch: Any) -> list[Any]:
    """A collated batch as a list of samples made of plain numbers."""
    if isinstance(batch, torch.Tensor):
        return list(batch.tolist())
    return [repr(sample) for sample in zip(*(unbatched(field) for field in batch), strict=True)]


def cut(order: list[int], global_batch: int) -> list[list[int]]:
    return [order[start : start + global_batch] for start in range(0, len(order), global_batch)]


def shuffled(length: int, epoch: int, global_batch: int = 12) -> list[list[int]]:
    return cut(permutation(length, 5, epoch).tolist(), global_batch)


@pytest.mark.parametrize(("world_size", "accumulation"), WORLDS)
def test_global_batches_do_not_depend_on_the_layout(world_size: int, accumulation: int) -> None:
    ranks = loaders(range(101), world_size, accumulation)
    assert run(ranks) == shuffled(101, epoch=0)
    assert run(ranks) == shuffled(101, epoch=1)  # it moves on by itself
    assert all(len(rank) == 9 * accumulation for rank in ranks)


@settings(deadline=None, max_examples=40)
@given(
    length=st.integers(1, 60),
    global_batch=st.integers(1, 20),
    world_size=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    drop_last=st.booleans(),
    stream=st.booleans(),
)
def test_any_numbers_cover_the_epoch_once(
    length: int, global_batch: int, world_size: int, accumulation: int, drop_last: bool, stream: bool
) -> None:
    expected = cut(list(range(length)), global_batch)
    expected = [batch for batch in expected if len(batch) == global_batch or not drop_last]
    dataset = Numbers(length) if stream else range(length)

    def epoch() -> list[list[Any]]:
        made = loaders(dataset, world_size, accumulation, global_batch=global_batch, shuffle=False, drop_last=drop_last)
        return run(made)

    if expected:
        assert epoch() == expected
    else:
        with pytest.raises(DataError):
            epoch()


@pytest.mark.parametrize(("world_size", "accumulation"), WORLDS)
@pytest.mark.parametrize("stream", [False, True])
def test_weights_make_each_step_the_mean_over_its_samples(world_size: int, accumulation: int, stream: bool) -> None:
    values = torch.arange(101.0).square()
    ranks = loaders(Numbers(101) if stream else range(101), world_size, accumulation, shuffle=False)
    sums, weights = torch.zeros(9), torch.zeros(9)
    for step, parts in enumerate(zip(*ranks, strict=True)):
        for rank, part in zip(ranks, parts, strict=True):
            assert len(part) == max(rank.samples, 1)  # a padding sample is there, but weighs nothing
            sums[step // accumulation] += rank.weight * values[part].mean()
            weights[step // accumulation] += rank.weight
    means = torch.stack([values[batch].mean() for batch in cut(list(range(101)), 12)])
    torch.testing.assert_close(sums / weights, means)
    torch.testing.assert_close(weights[:-1] * ranks[0].batch_size, torch.full((8,), 12.0))


def test_weight_and_samples_of_full_smaller_and_padding_micro_batches() -> None:
    ranks = loaders(range(7), 3, 1, global_batch=6, shuffle=False)  # 6 = 2 + 2 + 2, then 1 = 1 + 0 + 0
    seen = [[(part.tolist(), rank.samples, rank.weight) for part in rank] for rank in ranks]
    assert seen == [
        [([0, 1], 2, 1.0), ([6], 1, 0.5)],
        [([2, 3], 2, 1.0), ([6], 0, 0.0)],
        [([4, 5], 2, 1.0), ([6], 0, 0.0)],
    ]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dataset", [Noisy(), NoisyStream()], ids=["indexed", "stream"])
def test_augmentation_does_not_depend_on_layout_or_workers(dataset: Any, workers: int) -> None:
    (alone,) = loaders(dataset, 1, 1)
    expected = [run([alone]) for _ in range(2)]
    assert not {sample for batch in expected[0] for sample in batch} & {
        sample for batch in expected[1] for sample in batch
    }
    for world_size, accumulation in [(1, 2), (2, 1)] if workers else WORLDS[1:]:
        ranks = loaders(dataset, world_size, accumulation, num_workers=workers)
        assert [run(ranks) for _ in range(2)] == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_random_states_outside_are_not_touched(workers: int) -> None:
    (loader,) = loaders(Noisy(), 1, 2, num_workers=workers)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    run([loader])
    now = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    assert now == states


def masking(samples: list[int]) -> torch.Tensor:
    return torch.tensor(samples) * 1000 + torch.randint(1000, (len(samples),))


@pytest.mark.parametrize("dataset", [range(101), Numbers(101)], ids=["indexed", "stream"])
def test_random_collate_function_is_the_same_after_a_resume(dataset: Any) -> None:
    ranks = loaders(dataset, 2, 2, collate_fn=masking)
    whole = run(ranks)
    again = loaders(dataset, 2, 2, collate_fn=masking, num_workers=1)
    for rank in again:
        rank.load_state_dict(rank.state_dict() | {"batch": 5})
    assert run(again) == whole[5:]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", [0, 1, 4, 8])
def test_resume_at_another_layout_goes_on_with_the_same_global_batches(stop: int, stream: bool) -> None:
    def make(world_size: int, accumulation: int, **settings: Any) -> list[Loader]:
        return loaders(Numbers(101) if stream else range(101), world_size, accumulation, **settings)

    before = make(2, 2, num_workers=1, prefetch_factor=8)
    run(before)
    whole = run(make(1, 1)) if stream else shuffled(101, epoch=1)
    assert run(before, windows=stop) == whole[:stop]
    state = json.loads(json.dumps(before[0].state_dict()))  # what workers prefetched does not count
    assert (state["epoch"], state["batch"]) == (1, stop)
    for world_size, accumulation in WORLDS:
        after = make(world_size, accumulation)
        for rank in after:
            rank.load_state_dict(state)
        assert run(after) == whole[stop:]
        assert run(after)[0] == (whole[0] if stream else shuffled(101, epoch=2)[0])


def test_state_inside_a_window_is_its_start() -> None:
    (loader,) = loaders(range(101), 1, 3)
    iterator = iter(loader)
    starts = []
    for _ in range(7):
        next(iterator)
        starts.append((loader.state_dict()["batch"], loader.state_dict(stepped=False)["batch"]))
    assert starts == [(0, 0), (0, 0), (1, 0), (1, 1), (1, 1), (2, 1), (2, 2)]
    assert loader.position == Position(epoch=0, batch=2, micro=1)


def test_end_of_an_epoch_is_the_start_of_the_next() -> None:
    (loader,) = loaders(range(101), 1, 1)
    for _ in islice(loader, 9):
        assert loader.epoch == 0
    state = loader.state_dict()
    assert (state["epoch"], state["batch"]) == (1, 0)
    assert (loader.state_dict(stepped=False)["epoch"], loader.state_dict(stepped=False)["batch"]) == (0, 8)
    assert run([loader]) == shuffled(101, epoch=1)  # not an empty rest


def test_stream_left_exactly_at_its_end_starts_over() -> None:
    (loader,) = loaders(Numbers(24), 1, 1)
    assert len(list(islice(loader, 2))) == len(list(islice(loader, 2))) == 2
    resumed = loaders(Numbers(24), 1, 1)[0]
    resumed.load_state_dict(loader.state_dict())
    assert run([resumed]) == []  # only reading tells that the epoch had ended
    assert resumed.epoch == 2


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("seed", {"seed": 6}),
        ("global_batch", {"global_batch": 6}),
        ("length", {"dataset": range(102)}),
        ("order", {"shuffle": False}),
        ("order", {"sampler": list(reversed(range(101)))}),
    ],
)
def test_a_position_of_another_sequence_is_refused(name: str, other: dict[str, Any]) -> None:
    (saved,) = loaders(range(101), 1, 1)
    run([saved], windows=2)
    (loader,) = loaders(**({"dataset": range(101), "world_size": 1, "accumulation": 1} | other))
    with pytest.raises(DataError, match=f"its {name} is"):
        loader.load_state_dict(saved.state_dict())
    assert loader.position == Position(epoch=0)


@pytest.mark.parametrize(
    "state", [{}, {"epoch": 0, "batch": "1"}, {"epoch": 0, "batch": 10}, {"epoch": -1, "batch": 0}]
)
def test_a_state_that_is_no_position_is_refused(state: dict[str, Any]) -> None:
    (loader,) = loaders(range(101), 1, 1, shuffle=False)
    known = {name: value for name, value in loader.state_dict().items() if name not in ("epoch", "batch")}
    with pytest.raises(DataError, match="position"):
        loader.load_state_dict(known | state)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_iteration_is_continued_and_said(workers: int, caplog: pytest.LogCaptureFixture) -> None:
    (loader,) = loaders(range(101), 1, 2, num_workers=workers)
    with caplog.at_level(logging.WARNING, "shardline"):
        seen = [index for part in islice(loader, 3) for index in part.tolist()]
        assert not caplog.records
        seen += [index for part in loader for index in part.tolist()]
    assert seen == permutation(101, 5, 0).tolist()
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        "An iteration over the loader was interrupted"
    ]


def test_set_epoch_keeps_a_loaded_position_and_says_what_it_leaves(caplog: pytest.LogCaptureFixture) -> None:
    (loader,) = loaders(range(101), 1, 1)
    loader.load_state_dict(loader.state_dict() | {"batch": 6})
    loader.set_epoch(0)
    assert run([loader], windows=2) == shuffled(101, epoch=0)[6:8]
    with caplog.at_level(logging.WARNING, "shardline"):
        loader.set_epoch(4)
    assert "leaves epoch 0 after 8 of 9 global batches" in caplog.text
    assert run([loader]) == shuffled(101, epoch=4)


def test_an_old_iterator_is_refused() -> None:
    (loader,) = loaders(range(101), 1, 1)
    for leave in (lambda: next(iter(loader)), lambda: loader.set_epoch(9), loader.close):
        old = iter(loader)
        next(old)
        leave()
        with pytest.raises(UsageError, match="is over"):
            next(old)


def workers_alive() -> int:
    """Processes of loaders; the ranks of other tests may be kept as well, and are no daemons."""
    return sum(each.daemon for each in multiprocessing.active_children())


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_no_worker_is_left_after_close_and_the_position_stays(stream: bool, persistent: bool) -> None:
    (loader,) = loaders(
        Numbers(101) if stream else range(101), 1, 1, num_workers=2, persistent_workers=persistent, shuffle=False
    )
    iterator = iter(loader)
    seen = [next(iterator).tolist() for _ in range(2)]
    assert workers_alive() == 2
    loader.close()
    assert workers_alive() == 0
    seen += run([loader])
    assert seen == cut(list(range(101)), 12)
    assert run([loader]) == cut(list(range(101)), 12)
    assert workers_alive() == (2 if persistent else 0)
    loader.close()
    assert workers_alive() == 0


def test_workers_end_with_an_interrupted_iteration() -> None:
    (loader,) = loaders(range(101), 1, 1, num_workers=1)
    for _ in loader:
        break
    assert workers_alive() == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_sample_names_it_and_loses_nothing(workers: int) -> None:
    class Broken(Noisy):
        def __getitem__(self, index: int) -> Any:
            return 1 // (index - 13)

    (loader,) = loaders(Broken(), 1, 1, num_workers=workers, shuffle=False)
    iterator = iter(loader)
    next(iterator)
    for _ in range(2):  # not skipped when it is tried again
        with pytest.raises(ZeroDivisionError) as caught:
            list(loader)
        assert "sample 13 of epoch 0" in str(caught.value) + str(getattr(caught.value, "__notes__", ""))
        assert loader.position == Position(epoch=0, batch=1)


def test_an_error_in_a_stream_is_not_taken_for_its_end() -> None:
    class Broken(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[int]:
            yield from range(15)
            raise OSError("disk")

    (loader,) = loaders(Broken(), 1, 1)
    for _ in range(2):
        with pytest.raises(OSError, match="disk") as caught:
            list(loader)
        assert "sample 15 of the stream" in caught.value.__notes__[0]


def test_default_collate_and_samples_that_are_not_tensors() -> None:
    (loader,) = loaders(TensorDataset(torch.arange(24.0), torch.arange(24)), 1, 1, shuffle=False)
    inputs, labels = next(iter(loader))
    assert inputs.dtype == torch.float32 and labels.tolist() == list(range(12))
    (words,) = loaders(["one", "two", "three"], 1, 1, shuffle=False)
    assert list(words) == [["one", "two", "three"]]


class Sharded(IterableDataset):  # type: ignore[type-arg]
    """What a dataset looks like that is split by rank already."""

    sharded = True

    def __init__(self, rank: int, yields: int = 10, says: int = 10) -> None:
        self.rank, self.yields, self.says = rank, yields, says

    def __len__(self) -> int:
        return self.says

    def __iter__(self) -> Iterator[int]:
        return iter(range(100 * self.rank, 100 * self.rank + self.yields))


def sharded(world_size: int, **kwargs: int) -> list[Loader]:
    return [
        Loader(
            Sharded(rank, **kwargs),
            global_batch=6,
            micro_batch=2,
            accumulation=2,
            rank=rank,
            world_size=world_size,
            seed=1,
        )
        for rank in range(world_size)
    ]


def test_a_dataset_split_by_rank_is_not_split_again() -> None:
    ranks = sharded(2)
    seen = [[part[: rank.samples].tolist() for part in rank] for rank in ranks]
    assert seen[0] == [[0, 1], [2], [3, 4], [5], [6, 7], [8], [9], []]
    assert seen[1] == [[100 + index for index in part] for part in seen[0]]
    with pytest.raises(DataError, match="its world_size is 2, here it is 3"):
        sharded(3)[0].load_state_dict(ranks[0].state_dict())


@pytest.mark.parametrize("yields", [5, 9, 11, 25])
def test_a_dataset_split_by_rank_must_keep_to_its_length(yields: int) -> None:
    handed = 0
    with pytest.raises(DataError, match=r"len\(\)"):
        for _ in sharded(2, yields=yields)[1]:
            handed += 1
    assert handed <= 8  # not one micro-batch more than the other rank has


def test_a_stream_that_is_used_up_or_shorter_than_the_position_is_an_error() -> None:
    (loader,) = loaders((index for index in range(20)), 1, 1)
    list(loader)
    with pytest.raises(DataError, match="ended after 0 samples"):
        list(loader)
    (shorter,) = loaders(Numbers(30), 1, 1)
    shorter.load_state_dict(shorter.state_dict() | {"batch": 4})
    with pytest.raises(DataError, match="ended after 30 samples in epoch 0; at least 37"):
        list(shorter)


class Parsed(IterableDataset[int]):
    """Its ``__next__`` finds nothing in record 10, and StopIteration comes out."""

    def __len__(self) -> int:
        return 20

    def __iter__(self) -> Iterator[int]:
        self.left = iter(range(20))
        return self

    def __next__(self) -> int:
        index = next(self.left)
        return next(iter([index] if index != 10 else []))


def test_a_stream_that_ends_before_its_length_is_said(caplog: pytest.LogCaptureFixture) -> None:
    for loader in loaders(Parsed(), 1, 1):
        assert len([sample for batch in loader for sample in batch]) == 10
    assert "Parsed ended after 10 samples in epoch 0, but its len() is 20" in caplog.text
    caplog.clear()
    for loader in loaders(Numbers(30), 2, 1):
        list(loader)
    assert not caplog.text


class TellsEpoch(Noisy):
    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> int:  # type: ignore[override]
        return self.epoch


def test_a_dataset_is_told_the_epoch_in_lasting_workers_too() -> None:
    (loader,) = loaders(TellsEpoch(), 1, 1, num_workers=2, persistent_workers=True)
    assert [{int(value) for part in loader for value in part} for _ in range(3)] == [{0}, {1}, {2}]
    loader.close()


class KnowsWorker(Noisy):
    def __getitem__(self, index: int) -> bool:  # type: ignore[override]
        info = get_worker_info()
        assert info is not None
        return info.dataset is self and info.num_workers == 2


def test_get_worker_info_gives_the_users_dataset() -> None:
    (loader,) = loaders(KnowsWorker(), 1, 1, num_workers=2)
    assert all(all(part.tolist()) for part in loader)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dataset": []}, "no global batch"),
        ({"dataset": range(11), "drop_last": True}, "no global batch"),
        ({"dataset": 5}, "neither"),
        ({"global_batch": 0}, "at least 1"),
        ({"rank": 2}, "0 to 1"),
        ({"micro_batch": 5}, "up to 6 samples"),
        ({"dataset": Numbers(9), "sampler": [1]}, "sampler"),
        ({"sampler": DistributedSampler(range(9), num_replicas=2, rank=0)}, "2 ranks"),  # type: ignore[arg-type]
        ({"dataset": Sharded(0), "global_batch": 5}, "multiple"),
    ],
)
def test_what_cannot_be_split_is_a_sentence(changes: dict[str, Any], sentence: str) -> None:
    good = {"dataset": range(101), "global_batch": 12, "micro_batch": 6, "accumulation": 1}
    with pytest.raises(DataError, match=sentence):
        Loader(**({**good, "rank": 0, "world_size": 2, "seed": 0} | changes))


class Long:
    """Says that it has ``length`` samples, and has 20."""

    def __init__(self, length: Any) -> None:
        self.length = length

    def __len__(self) -> int:
        if isinstance(self.length, Exception):
            raise self.length
        return self.length  # type: ignore[no-any-return]

    def __getitem__(self, index: int) -> int:
        return range(20)[index]


class LongStream(Numbers):
    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(range(20))


LENGTHS = [-1, -(10**30), 2.5, "x", None, 10**12, 10**18, 10**30, OSError("gone"), KeyError("n")]


@pytest.mark.parametrize("kind", [Long, LongStream])
def test_lengths_that_cannot_be(kind: Any) -> None:
    """10 inputs of each kind. Only a stream may be as long as it likes."""
    for length in LENGTHS:
        possible = kind is LongStream and length in (10**12, 10**18)
        try:
            loaders(kind(length), 2, 1)
        except DataError as error:
            assert f"len() of the dataset {kind.__name__} " in str(error) and not possible, length
        else:
            assert possible, length


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("options", [{}, {"shuffle": False}, {"sampler": [3, 25, 4, 9]}])
def test_a_length_that_is_too_long_is_told_with_index_and_rank(workers: int, options: dict[str, Any]) -> None:
    (loader,) = loaders(Long(40), 1, 1, num_workers=workers, **options)
    with pytest.raises(DataError, match=r"Long has no sample [23]\d, which epoch 0 draws on rank 0") as caught:
        for _ in loader:
            pass
    assert "Its len() is 40" in str(caught.value)
    loader.close()


STUCK = """
import os, signal, time
from shardline.data import Loader

class Stuck:
    def __len__(self):
        return 8
    def __getitem__(self, index):
        if index > 1:
            time.sleep(600)
        return index

sizes = {"global_batch": 2, "micro_batch": 2, "accumulation": 1, "rank": 0, "world_size": 1}
batches = iter(Loader(Stuck(), seed=0, shuffle=False, num_workers=1, **sizes))
next(batches)
print(open(f"/proc/self/task/{os.getpid()}/children").read(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a process ends with its parent on Linux only")
def test_a_worker_in_the_middle_of_a_sample_ends_with_a_rank_that_is_killed() -> None:
    done = subprocess.run([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True, timeout=200)
    (worker,) = map(int, done.stdout.split())
    deadline = time.monotonic() + 20
    while (gone := not Path(f"/proc/{worker}").exists()) is False and time.monotonic() < deadline:
        time.sleep(0.01)
    assert gone


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinning needs CUDA")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_pinned(workers: int) -> None:
    (loader,) = loaders(Noisy(), 1, 1, num_workers=workers, pin_memory=True)
    for fields in loader:
        assert all(field.is_pinned() for field in fields)
        assert loader.samples == len(fields[0])
