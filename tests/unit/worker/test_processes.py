"""What a worker process arranges before NumPy and MPI are loaded."""

import os
import subprocess
import sys
import time
from pathlib import Path

from worker import processes


def test_the_rank_is_read_from_any_launcher() -> None:
    assert processes.rank_before_mpi({}) == 0
    assert processes.rank_before_mpi({"OMPI_COMM_WORLD_RANK": "3"}) == 3
    assert processes.rank_before_mpi({"SLURM_PROCID": "2"}) == 2


def test_a_process_has_ended_before_its_parent_asks() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        assert not processes.has_ended(process.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie and stays one
        assert processes.has_ended(process.pid)
    assert processes.has_ended(process.pid)


def test_ranks_share_the_cores_and_what_the_user_set_stays() -> None:
    environ = {"OMPI_COMM_WORLD_LOCAL_SIZE": "3", "OMP_NUM_THREADS": "7"}
    processes.set_blas_threads(environ, cores=8)
    assert environ["OPENBLAS_NUM_THREADS"] == "2"
    assert environ["OMP_NUM_THREADS"] == "7"


def test_more_ranks_than_cores_get_one_thread_each() -> None:
    environ = {"OMPI_COMM_WORLD_LOCAL_SIZE": "5"}
    processes.set_blas_threads(environ, cores=2)
    assert environ["OPENBLAS_NUM_THREADS"] == "1"


def test_a_reproducible_job_has_one_thread_whatever_is_set() -> None:
    environ = {"OMP_NUM_THREADS": "7"}
    processes.set_blas_threads(environ, cores=8, reproducible=True)
    assert environ == dict.fromkeys(processes.THREAD_VARIABLES, "1")


def test_output_of_python_and_of_c_goes_to_the_ranks_own_log(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from worker import processes\n"
        f"processes.redirect_output(Path({str(tmp_path)!r}), 4)\n"
        "print('from python', flush=True); os.write(2, b'from below\\n')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == done.stderr == ""
    assert (tmp_path / "rank-4.log").read_text() == "from python\nfrom below\n"


def test_process_start_time_lies_just_before_now() -> None:
    program = "from worker.processes import process_start_time; print(process_start_time())"
    before = time.time()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert before - 0.05 <= float(done.stdout) <= time.time()
