#!/bin/sh
#SBATCH --job-name=paceline-digits-1-2
#SBATCH --ntasks=2
#SBATCH --output=/state/jobs/digits-1/logs/launcher.log
#SBATCH --open-mode=append
#SBATCH --export=ALL
#SBATCH --signal=B:USR1@30
#SBATCH --no-requeue
exec /venv/bin/python -I -S /venv/keeper.py --hosted /state/jobs/digits-1/logs/attempt-2 /venv/bin/mpirun -n 2 --bind-to none --map-by :OVERSUBSCRIBE -x PACELINE_JOB_TOKEN /venv/bin/paceline-worker train job.yaml -o "out folder"
