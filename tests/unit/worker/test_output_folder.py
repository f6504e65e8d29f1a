"""What of metrics.jsonl stays when a run is taken up again: the lines of what is not done anew."""

import json
from pathlib import Path

import pytest

from worker.measurements import Position
from worker.output_folder import METRICS, cut_metrics

# Stopped behind the epoch's last step, 10, resumed and evaluated; the last line was being written.
LINES = [(4, None), (10, None), (10, 0.5), (12, None)]


@pytest.mark.parametrize(
    ("start", "kept"),
    [
        (Position(), 0),
        (Position(step=4, batches=4), 1),
        (Position(step=9, batches=9), 1),
        (Position(step=10, batches=10), 2),  # the evaluation is to come
        (Position(step=10, epoch=1), 3),
        (Position(step=12, epoch=1, batches=2), 4),
        (Position(step=20, epoch=2), 4),
    ],
)
def test_lines_up_to_where_a_run_goes_on_stay(tmp_path: Path, start: Position, kept: int) -> None:
    lines = [json.dumps({"step": step} | ({"validation_loss": loss} if loss else {})) + "\n" for step, loss in LINES]
    (tmp_path / METRICS).write_text("".join([*lines, '{"step": 1']))
    cut_metrics(tmp_path, start)
    assert (tmp_path / METRICS).read_text() == "".join(lines[:kept])
