"""Many more ranks than cores: the right result, and a clean end."""

from pathlib import Path

from safetensors.numpy import load_file

from tests.mpi.jobs import assert_close, summary, train, write_data, write_job

RANKS = 64  # more than a batch has samples, so some ranks have none in any step


def test_sixty_four_ranks_on_one_machine_give_the_weights_of_one(run_ranks, tmp_path: Path) -> None:
    job = write_job(tmp_path, write_data(tmp_path / "data.npz"), training={"epochs": 2})
    reference = train(run_ranks, 1, job, tmp_path / "one")
    done = run_ranks(RANKS, ["-m", "worker", "train", job, "-o", tmp_path / "many"], timeout_seconds=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    assert summary(tmp_path / "many")["world_size"] == RANKS
    assert_close(load_file(tmp_path / "many" / "model.safetensors"), reference)
