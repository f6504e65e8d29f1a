#!/bin/sh
#SBATCH --job-name=paceline-digits-1-2
#SBATCH --ntasks=1
#SBATCH --output="/a b/100%%/\$HOME \"x\"/launcher.log"
#SBATCH --open-mode=append
#SBATCH --export=ALL
#SBATCH --signal=B:USR1@30
#SBATCH --no-requeue
exec /venv/bin/python -I -S /venv/keeper.py --hosted "/a b/100%/\$HOME \"x\"/attempt-2" /venv/bin/mpirun -n 1 --bind-to none --map-by :OVERSUBSCRIBE -x PACELINE_JOB_TOKEN /venv/bin/paceline-worker train job.yaml -o "out folder"
