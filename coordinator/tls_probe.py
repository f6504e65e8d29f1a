"""Why a coordinator cannot be spoken to, where it is TLS that stands between: asked of the socket itself.

gRPC says of all such faults that the connection failed, in words that change with its versions.
"""

from __future__ import annotations

import contextlib
import socket
import ssl

from coordinator.addresses import Address
from coordinator.credentials import Credentials

PROBE_SECONDS = 3.0  # for each of connecting, shaking hands and the first answer


def tls_fault(address: Address, credentials: Credentials) -> str | None:
    """One line; None where nothing answers at all, or TLS is not what is wrong."""
    try:
        with socket.create_connection(address, PROBE_SECONDS) as plain:
            return _fault_with_tls(address, credentials, plain) if credentials.tls else _fault_without(address, plain)
    except OSError:
        return None


def _fault_without(address: Address, plain: socket.socket) -> str | None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # only whether it speaks TLS; nothing is sent
    with contextlib.suppress(ssl.SSLError, OSError), context.wrap_socket(plain):
        return f"the coordinator at {address} speaks TLS: give --tls-ca FILE, which vouches for it, or --tls"
    return None


def _fault_with_tls(address: Address, credentials: Credentials, plain: socket.socket) -> str | None:
    try:
        secure = _context(credentials).wrap_socket(plain, server_hostname=address.host)
    except TimeoutError:
        return None
    except ssl.SSLCertVerificationError as fault:
        why = fault.verify_message.rstrip(".")
        return f"the certificate of {address} is not accepted: {why}; see --tls-ca, and the host in --server"
    except (ssl.SSLError, ConnectionError):
        return f"what answers at {address} speaks no TLS: leave --tls and --tls-ca out, or name the port that does"
    with secure:
        try:
            greeted = secure.recv(1) != b""  # a gRPC server speaks first, unless it wants a certificate it has not got
        except TimeoutError:
            return None
        except OSError:
            greeted = False
    if greeted:
        return None
    if credentials.certificate:
        return f"the coordinator at {address} does not accept this client's certificate; see --tls-certificate"
    return f"the coordinator at {address} asks for a client certificate: give --tls-certificate and --tls-key"


def _context(credentials: Credentials) -> ssl.SSLContext:
    """What gRPC accepts; no certificate is shown."""
    if not credentials.ca:
        context = ssl.create_default_context()
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
        context.load_verify_locations(cadata=credentials.ca.decode("ascii", "ignore"))
    context.set_alpn_protocols(["h2"])  # gRPC answers nobody without
    return context
