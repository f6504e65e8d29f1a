"""Environment variables by which a launcher tells workers whom to report to, and those that Open MPI reads.

A token goes by environment and not by argument: arguments are readable by every user of the machine.
"""

COORDINATOR_ADDRESS = "PACELINE_COORDINATOR"  # host:port of the CoordinatorService
COORDINATOR_ADDRESS_FILE = "PACELINE_COORDINATOR_FILE"  # says it anew when the coordinator came back elsewhere
JOB_ID = "PACELINE_JOB_ID"
JOB_ATTEMPT = "PACELINE_JOB_ATTEMPT"
JOB_TOKEN = "PACELINE_JOB_TOKEN"
STORE = "PACELINE_STORE"  # what `paceline serve` takes when --store is absent; it may hold a password
PARAMETERS_ALLOWED = "PACELINE_PARAMETERS_ALLOWED"  # of a job's model, at most; absent: any number
DATA_ROOTS = (
    "PACELINE_DATA_ROOTS"  # a JSON list of folders and URLs below which workers may read data; absent: anywhere
)
COORDINATOR_CERTIFICATE = "PACELINE_COORDINATOR_CERTIFICATE"  # PEM file by which workers know the coordinator: TLS
COORDINATOR_NAME = "PACELINE_COORDINATOR_NAME"  # the host that certificate is good for, whatever the address is
COORDINATOR_KEY = "PACELINE_COORDINATOR_KEY"  # its key: workers show both, where the coordinator asks for a certificate

# What client verbs take when the option is absent.
TOKEN = "PACELINE_TOKEN"  # the secret itself
TOKEN_FILE = "PACELINE_TOKEN_FILE"
TLS = "PACELINE_TLS"
TLS_CA = "PACELINE_TLS_CA"
TLS_CERTIFICATE = "PACELINE_TLS_CERTIFICATE"
TLS_KEY = "PACELINE_TLS_KEY"
SECRETS = (TOKEN, STORE)  # no job's processes are given these
SERVER_ADDRESS = "PACELINE_SERVER"  # what client verbs take when --server is absent

# The pip-installed Open MPI probes UCX for a second at start and prints errors about it. Where there is no InfiniBand,
# naming the transports saves that second.
FAST_START = {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm,tcp", "OMPI_MCA_osc": "^ucx"}

# Without both, mpirun refuses to run as root, as in most containers. They mean nothing to other users.
ROOT_ALLOWED = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
