"""Who takes part in the steps of a shard: the founding workers, which mpirun started, and guests, who come and go.

Founding workers 0 to W - 1 live and die together: one that is lost ends the job. Guests count from W on. One that is
lost, or silent for longer than its lease, is dropped, and nobody waits for it any more.

In the synchronous mode the workers of a step must cut its batch alike, and every shard must wait for just those
workers, or a step would count samples twice or never end. One shard decides, the authority, which holds element 0:

1. A guest joins the authority, which numbers it, then the other shards, then opens its streams, the authority's last.
   From then on every shard sends it every answer.
2. When the authority applies step t of its first chunk, its answer names the guests of step t + 1. A guest whose stream
   was opened while the authority was at step s is named from step s + 2 on: no shard had begun with step s + 1 then,
   so the guest has all weights of that step by the answers it is sent, and needs no other start.
3. Every push names the guests its batch was cut for. A shard waits for the founding workers, and for those of the
   guests named that it knows and has not dropped. Nobody is waited for who has no stream here, and whoever has one
   sends, leaves or is dropped after its lease: so no step waits for ever. Shards may differ on who was dropped when;
   each divides by the samples whose gradients it has.
4. A shard that was dead knows no guests. They lose their streams with it, leave the other shards and join again. When
   it was the authority, workers may have been told differently of one step: all guests that any of them names are
   waited for, as in 3, and the samples cut twice or not at all in that one batch cost no more than that.

A guest of a synchronous job that leaves says so before its last push, so the next answer names it no more. In the modes
with clocks a guest takes part from the opening of its stream to its leave, and each worker cuts by what it was told
last.

Rules: no I/O, no clock; `now` is an argument.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from worker.server.pushes import MOST_GUESTS, Apart, Conflict, Refused, ShardSetup

JOINING_SECONDS = 30.0  # from a guest's join to its stream


@dataclass
class Guest:
    """One that joined and is not gone."""

    clock: int  # the step it begins behind, where workers have clocks
    heard: float  # when it last was
    first_step: int | None = None  # that it may take part in; None until its stream is open
    leaving: bool = False  # it has said that it pushes no more than what is waited for


class News(NamedTuple):
    """What became of a guest."""

    line: str
    dropped: int | None = None  # whose stream is to be ended with that line


class Members:
    """The workers of one shard."""

    def __init__(self, setup: ShardSetup) -> None:
        self._setup = setup
        self._founding = range(setup.workers)
        self.joined: set[int] = set()  # of the founding workers
        self.left: dict[int, int] = {}  # founding worker -> the last step before it left
        self.guests: dict[int, Guest] = {}
        self.dropped = 0  # guests, so far
        self._gone: dict[int, str] = {}  # guest -> what it is told should it push again
        self._next = setup.workers
        self.news: list[News] = []

    @property
    def over(self) -> bool:
        """All founding workers have left: the job is."""
        return len(self.left) == len(self._founding)

    @property
    def present(self) -> tuple[int, ...]:
        """The guests that have a stream."""
        return tuple(sorted(number for number, guest in self.guests.items() if guest.first_step is not None))

    def name(self, worker: int) -> str:
        """As messages call it."""
        if worker in self._founding:
            return f"worker {worker} of {len(self._founding)}"
        return f"guest {worker}"

    def parted(self, worker: int) -> str:
        """What is said of a founding worker that has left."""
        return f"{self.name(worker)} left after step {self.left[worker]}, the others went on to the next"

    def is_founding(self, worker: int) -> bool:
        """Whether mpirun started it."""
        return worker in self._founding

    def check(self, worker: int, generation: int) -> None:
        """Refuse a worker of another launch, a number that nobody has, and a guest that is gone."""
        setup = self._setup
        if generation != setup.generation:
            age = "an earlier" if generation < setup.generation else "a later"
            raise Conflict(
                f"worker {worker} is of {age} launch: generation {generation}, "
                f"the parameter server's is {setup.generation}"
            )
        if worker in self._founding or worker in self.guests:
            return
        if worker in self._gone:
            raise Apart(self._gone[worker])
        if setup.guests and worker >= setup.workers:
            raise Apart(f"guest {worker} is not known here; join again")
        raise Refused(f"worker {worker} does not exist: there are {len(self._founding)}, counted from 0")

    def check_joined(self, worker: int, generation: int) -> None:
        """Refuse whoever could not push."""
        self.check(worker, generation)
        if worker not in (self.joined if worker in self._founding else self.present):
            raise Conflict(f"{self.name(worker)} has not joined")

    def welcome(self, number: int, step: int, now: float) -> int:
        """Take in a guest, by the number that the authority gave it; -1 where this is the authority."""
        if len(self.guests) >= MOST_GUESTS:
            raise Apart(f"the job has {MOST_GUESTS} guests already: join again later")
        if number == -1:
            number = self._next
        elif number in self._founding or number < 0:
            raise Refused(f"guest {number} cannot be: numbers below {len(self._founding)} are the founding workers'")
        elif number in self.guests:
            raise Apart(f"guest {number} is here already: join again")
        self._next = max(self._next, number + 1)
        self._gone.pop(number, None)
        self.guests[number] = Guest(step, now)
        return number

    def open(self, number: int, first_step: int, now: float) -> None:
        """Its stream is there: it may take part from this step on."""
        guest = self.guests[number]
        guest.first_step, guest.heard = first_step, now
        self.news.append(News(f"guest {number} has joined; it takes part from step {first_step} on"))

    def hear(self, worker: int, now: float) -> None:
        """A word of this worker, whatever it says."""
        if worker in self.guests:
            self.guests[worker].heard = now

    def silent(self, now: float) -> list[tuple[int, str]]:
        """The guests whose lease has run out, each with the reason."""
        found = []
        for number, guest in self.guests.items():
            lease = self._setup.lease_seconds if guest.first_step is not None else JOINING_SECONDS
            if now - guest.heard > lease:
                found.append((number, f"it was silent for {now - guest.heard:.1f} s"))
        return found

    @property
    def staying(self) -> tuple[int, ...]:
        """Of those the ones that have not said that they leave."""
        return tuple(number for number in self.present if not self.guests[number].leaving)

    def of_step(self, step: int) -> tuple[int, ...]:
        """The guests that a synchronous step's batch is cut for, in the order of their places."""
        return tuple(number for number in self.staying if (self.guests[number].first_step or 0) <= step)

    def waited_for(self, named: Collection[int]) -> set[int]:
        """Whose pushes a synchronous chunk needs, when these guests were named."""
        return {*self._founding, *(number for number in named if number in self.guests)}

    def lose(self, number: int, step: int, why: str) -> None:
        """A guest is gone; nothing to say of one that had said so."""
        if self.guests.pop(number).leaving:
            self.part(number, step)
            return
        line = f"guest {number} was dropped in step {step}: {why}"
        self._gone[number] = f"{line}; join again"
        self.dropped += 1
        self.news.append(News(line, dropped=number))

    def part(self, number: int, step: int) -> None:
        """A guest has left."""
        self.guests.pop(number, None)
        self._gone[number] = f"guest {number} left before step {step}; join again"
        self.news.append(News(f"guest {number} has left before step {step}"))
