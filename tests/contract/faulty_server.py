"""`paceline-worker serve-parameters` with chunks of eight elements, which kills itself once, where it is told to.

Arguments: where (never, push, apply, answer or pull), a file whose presence says that it has happened, then those of
`paceline-worker`. In the environment, where it is otherwise: FAULTY_STEP, in which it happens, and FAULTY_SIGNAL.
"""

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import worker.server.pushes
import worker.server.service
import worker.update
from protos import parameter_server_pb2 as pb
from worker.__main__ import main
from worker.server.shard import Shard

CHUNK = 8
STEP = int(os.environ.get("FAULTY_STEP", "2"))  # in which it happens, with its second message
SIGNAL = signal.Signals[os.environ.get("FAULTY_SIGNAL", "SIGKILL")]
where, mark = sys.argv[1], Path(sys.argv[2])
del sys.argv[1:3]
seen = 0


def die_at_the_second(is_one: Callable[..., bool], work: Callable[..., Any]) -> Callable[..., Any]:
    """`work`, behind which the process ends once two calls were such as is meant."""

    @functools.wraps(work)
    def wrapped(*arguments: Any) -> Any:
        global seen
        result = work(*arguments)
        seen += is_one(*arguments)
        if seen == 2:
            with contextlib.suppress(FileExistsError):  # of several servers one alone makes the file
                mark.touch(exist_ok=False)
                os.kill(os.getpid(), SIGNAL)
        return result

    return wrapped


worker.server.pushes.even_chunk_elements = lambda count: CHUNK
if where == "push":
    Shard.receive = die_at_the_second(lambda shard, push, now: push.step == STEP, Shard.receive)
elif where == "apply":
    make = worker.update.make_update
    worker.update.make_update = lambda spec: (
        (made := make(spec)) and made._replace(update=die_at_the_second(lambda *given: given[3] == STEP, made.update))
    )
elif where in ("answer", "pull"):
    kind = pb.ExchangeResponse if where == "answer" else pb.PullResponse
    is_one = lambda head, field, array: isinstance(head, kind) and head.step == STEP  # noqa: E731
    worker.server.service.encode = die_at_the_second(is_one, worker.server.service.encode)
main()
